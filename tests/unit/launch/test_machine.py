"""Which GPUs an installation sees, which builds of torch they bear, and what it says of the others."""

import stat

import pytest

from launch.builds import BUILDS, Card, Refusal, fitting
from launch.machine import look, mig_is_on
from launch.torch_build import sources, wanted_version
from tests.unit.launch import machines
from tests.unit.launch.machines import A100, B200, H100, K80, NO_DRIVER, T4, V100


@pytest.fixture
def system(tmp_path):
    """The root of a machine's files, with a folder of programs that is the whole PATH."""
    (tmp_path / "bin").mkdir()
    return tmp_path


def seen(system, *, processor="x86_64", **env):
    machine = look(system, {"PATH": str(system / "bin"), **env}, processor)
    return [build.label for build in machine.builds], machine


def refusal(system, **options):
    with pytest.raises(Refusal) as error:
        seen(system, **options)
    message = str(error.value)
    assert "\n" not in message and 'set CUDA_VISIBLE_DEVICES=""' in message
    return message


@pytest.mark.parametrize(
    ("cards", "driver", "processor", "builds"),
    [
        ([A100], "580.65.06", "x86_64", ["cu130", "cu126"]),
        ([A100] * 8, "570.124.06", "x86_64", ["cu126"]),
        ([A100], "525.60.13", "x86_64", ["cu126"]),
        ([V100], "580.65.06", "x86_64", ["cu126"]),
        ([V100], "535.129.03", "x86_64", ["cu126"]),
        ([T4], "590.44.01", "x86_64", ["cu130", "cu126"]),
        ([A100, V100], "580.65.06", "x86_64", ["cu126"]),
        ([B200], "580.65.06", "x86_64", ["cu130"]),
        (["8.9, GPU-1, NVIDIA L4"], "580.65.06", "x86_64", ["cu130", "cu126"]),
        (["10.3, GPU-1, NVIDIA B300"], "580.65.06", "x86_64", ["cu130"]),
        (["12.1, GPU-1, NVIDIA GB10"], "580.95.05", "aarch64", ["cu130"]),
        (["9.0, GPU-1, NVIDIA GH200 480GB"], "560.35.03", "aarch64", ["cu126"]),
        (["10.0, GPU-1, NVIDIA GB200"], "580.65.06", "aarch64", ["cu130"]),
        (["8.6, GPU-1, NVIDIA A10"], "580.65.06", "aarch64", ["cu130", "cu126"]),
    ],
)
def test_builds_by_driver_and_card(system, cards, driver, processor, builds):
    machines.nvidia_smi(system / "bin", *cards, driver=driver)
    labels, machine = seen(system, processor=processor)
    assert labels == builds and len(machine.cards) == len(cards) and driver in str(machine)


@pytest.mark.parametrize(
    ("cards", "driver", "processor", "words"),
    [
        ([A100], "470.82.01", "x86_64", ["NVIDIA driver 470.82.01", "525 (CUDA 12.6) or 580 (CUDA 13.0)"]),
        ([B200], "570.86.15", "x86_64", ["NVIDIA driver 570.86.15", "B200", "at least 580 (CUDA 13.0)"]),
        (
            [K80],
            "525.60.13",
            "x86_64",
            ["Tesla K80 (compute capability 3.7)", "no build of torch has kernels"],
        ),
        ([A100, K80], "525.60.13", "x86_64", ["Tesla K80", "use another GPU (CUDA_VISIBLE_DEVICES=GPU-..."]),
        ([V100, B200], "580.65.06", "x86_64", ["V100", "B200", "choose GPUs of one kind"]),
        ([T4], "580.65.06", "aarch64", ["Tesla T4", "on aarch64"]),
    ],
)
def test_what_no_build_serves(system, cards, driver, processor, words):
    machines.nvidia_smi(system / "bin", *cards, driver=driver)
    message = refusal(system, processor=processor)
    assert all(word in message for word in words), message


def test_a_driver_that_does_not_know_the_capability(system):
    machines.old_nvidia_smi(system / "bin", "470.82.01", "Tesla V100-SXM2-16GB")
    assert "NVIDIA driver 470.82.01: torch on Tesla V100-SXM2-16GB (compute capability 7.0)" in refusal(
        system
    )


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_left_alone(system, hidden):
    machines.nvidia_smi(system / "bin", K80, driver="470.82.01")
    labels, machine = seen(system, CUDA_VISIBLE_DEVICES=hidden)
    assert labels == [] and str(machine).startswith("cpu ") and not machine.note


def test_only_the_gpus_that_are_named_count(system):
    machines.nvidia_smi(system / "bin", H100, K80)
    labels, machine = seen(system, CUDA_VISIBLE_DEVICES="GPU-cccc")
    assert labels == ["cu130", "cu126"] and [card.name for card in machine.cards] == ["NVIDIA H100 80GB HBM3"]
    assert "Tesla K80" in refusal(system, CUDA_VISIBLE_DEVICES="0"), "CUDA may count from another card on"
    assert "GPU-9999 names no GPU" in refusal(system, CUDA_VISIBLE_DEVICES="GPU-9999")


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (9, NO_DRIVER),
        (18, "Failed to initialize NVML: Driver/library version mismatch"),
        (6, "No devices were found"),
        (255, f"580.65.06, {A100}\nUnable to determine the device handle for GPU0000:65:00.0: Unknown Error"),
        (0, f"580.65.06, {A100}\n[Unknown Error], [N/A], GPU-1, NVIDIA A100"),
    ],
)
def test_a_driver_that_does_not_answer(system, status, text):
    machines.nvidia_smi(system / "bin", fails=(status, text))
    labels, machine = seen(system)
    said = text.splitlines()[-1].rstrip(".")
    assert labels == [] and f"nvidia-smi says: {said} (exit status {status})" in machine.note
    machines.on_the_bus(system)
    assert f"{said} (exit status {status}); there are NVIDIA GPUs (on the PCI bus)" in refusal(system)
    machines.device(system, "nvidia0")
    machines.device(system, "nvidiactl")
    assert "there are NVIDIA GPUs (/dev/nvidia0)," in refusal(system)


def test_windows_driver_under_wsl(system):
    folder = system / "usr/lib/wsl/lib"
    folder.mkdir(parents=True)
    machines.nvidia_smi(folder, "8.9, GPU-1, NVIDIA GeForce RTX 4090", driver="551.61")
    assert seen(system)[0] == ["cu126"]
    machines.nvidia_smi(folder, fails=(9, NO_DRIVER))
    machines.device(system, "dxg")
    assert "(/dev/dxg)" in refusal(system)


def test_a_container_with_gpus_and_without_nvidia_smi(system):
    models = {0: "Tesla K80", 3: "Tesla V100-SXM2-16GB"}
    machines.driver_files(system, driver="580.65.06", models=models, given=(3,))
    labels, machine = seen(system)
    assert labels == ["cu126"] and machine.cards == (Card("Tesla V100-SXM2-16GB", (7, 0), "GPU-3"),)


def test_a_gpu_of_which_nothing_is_known(system):
    machines.device(system, "nvidia0")
    assert refusal(system).startswith("/dev/nvidia0: a GPU, and neither nvidia-smi nor")


def test_gpus_that_are_not_offered_here(system):
    """A container on a GPU machine that was given none sees them on the bus and in the driver's files."""
    machines.driver_files(system, driver="580.65.06", models={0: "NVIDIA A100-SXM4-80GB"}, given=())
    machines.on_the_bus(system)
    labels, machine = seen(system)
    assert labels == [] and "not offered here" in machine.note and "--gpus all" in machine.note


def test_amd_and_nothing(system):
    assert seen(system)[1].note == ""
    machines.on_the_bus(system, kind="0x040300")  # the sound of a graphics card
    assert seen(system)[1].note == ""
    machines.device(system, "kfd")
    assert "AMD's GPUs (ROCm) are not supported" in seen(system)[1].note


def test_a_program_that_cannot_be_run(system):
    script = machines.nvidia_smi(system / "bin", A100)
    script.write_text("#!/no/such/interpreter\n", encoding="utf-8")
    script.chmod(stat.S_IRWXU)
    assert "No such file" in seen(system)[1].note


@pytest.mark.parametrize("mode", ["Enabled", "Disabled", "[N/A]"])
def test_a_gpu_in_slices_of_which_there_is_none(system, monkeypatch, mode):
    machines.program(system / "bin", f"echo '{mode}'\n")
    monkeypatch.setenv("PATH", str(system / "bin"))
    assert mig_is_on() == (mode == "Enabled")


def test_an_unknown_card_is_left_to_the_check_of_torch():
    labels = [build.label for build in fitting((Card("NVIDIA Graphics Device", None),), "580.1", "x86_64")]
    assert labels == ["cu130", "cu126"]


def test_the_builds_are_those_of_the_version_that_is_installed():
    """At another version look up what it is built with, then change this."""
    assert wanted_version().startswith("2.13.") and [build.label for build in BUILDS] == ["cu130", "cu126"]


def test_where_torch_is_looked_for(system):
    machines.nvidia_smi(system / "bin", A100)
    both = seen(system)[1]
    assert [(source.requirement, source.index) for source in sources(both, "2.13.0", "")] == [
        ("torch==2.13.0+cu130", ""),
        ("torch==2.13.0,!=2.13.0+cpu,!=2.13.0+cu126", ""),
        ("torch==2.13.0+cu126", ""),
        ("torch==2.13.0+cu130", "https://download.pytorch.org/whl/cu130"),
        ("torch==2.13.0+cu126", "https://download.pytorch.org/whl/cu126"),
    ]
    none = seen(system, CUDA_VISIBLE_DEVICES="")[1]
    assert [(source.requirement, source.index) for source in sources(none, "2.13.0", "")] == [
        ("torch==2.13.0+cpu", ""),
        ("torch==2.13.0+cpu", "https://download.pytorch.org/whl/cpu"),
        ("torch==2.13.0", ""),
    ]
    for machine, index, wanted in (
        (none, "https://mirror/whl/cu126", ["torch==2.13.0+cu126"]),
        (none, "https://mirror/simple", ["torch==2.13.0"]),
        (
            both,
            "https://mirror/simple",
            ["torch==2.13.0+cu130", "torch==2.13.0+cu126", "torch==2.13.0,!=2.13.0+cpu"],
        ),
    ):
        assert [source.requirement for source in sources(machine, "2.13.0", index)] == wanted
