"""What a run says when it ends: what it has learnt, where everything is, commands that work as printed."""

import os
import shlex
import sys
from pathlib import Path

from inrank_megatron.config.defaults import RUN_CONFIG, find_config, shown_path
from inrank_megatron.config.loading import load, replace
from inrank_megatron.config.schema import Config
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.learnt import beside_dense, sample_lines, size, verdict
from inrank_megatron.reporting.report import unfinished
from inrank_megatron.reporting.run import Run, read_run
from inrank_megatron.training.relaunch import launcher
from inrank_megatron.training.schedule import learning_rate

WIDTH = 96
TOOLS = "inrank_megatron_tools"
REAL_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1"


def last_lines(run_dir: str | Path, *, deepspeed_config: str | None = None) -> str:
    """The run's last screen.

    Args:
        deepspeed_config: the file that was given with the run, which going on needs, too.
    """
    run = read_run(run_dir)
    return "\n".join([*_learnt(run), *_places(run), "", *_commands(run, deepspeed_config)])


def tool(name: str) -> str:
    """The words that start a tool: its file in the checkout, else its module in the installed package."""
    path = Path(__file__).parents[2] / "tools" / f"{name}.py"
    return shlex.join(["python", shown_path(path)] if path.is_file() else ["python", "-m", f"{TOOLS}.{name}"])


def _learnt(run: Run) -> list[str]:
    facts = "; ".join(part for part in (verdict(run), size(run)) if part)
    lines = [line for line in (facts, beside_dense(run)) if line]
    if sample := sample_lines(run, width=WIDTH):
        lines += [f"it writes{sample[0]}", *(f"    {line}" for line in sample[1:])]
    return [*lines, ""] if lines else []


def _places(run: Run) -> list[str]:
    folder, report, plots = run.folder, run.folder / "report.html", run.folder / "plots"
    later = f"none yet: {tool('report')} {shlex.quote(str(folder))}"
    return [
        f"checkpoint  {folder / run.checkpoints[-1]['path'] if run.checkpoints else 'none yet'}",
        f"plots       {plots if plots.exists() else later}",
        f"report      {report if report.exists() else later}",
    ]


def _commands(run: Run, deepspeed_config: str | None) -> list[str]:
    (launch, where), quoted = launcher(run.summary), shlex.quote(str(run.folder))
    active = sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix
    activation = [] if active else [f"  first        source {shlex.quote(sys.prefix)}/bin/activate"]
    more, remark = _longer(run)
    extra = f" --deepspeed-config {shlex.quote(deepspeed_config)}" if deepspeed_config else ""
    if run.summary.get("world", {}).get("device") == "cpu":
        real = f"--inrank --dataset {REAL_TEXT} --save runs/wikitext-2"
    else:
        real = f"--config {shlex.quote(shown_path(find_config('gpt2_small_inrank.yaml')))}"
    words = [word for word in str(run.sample.get("prompt", "")).split() if word.isalpha()]
    prompt = shlex.quote(" ".join(words[:2]) or "The")
    written = [f"  its text     {tool('generate')} {quoted} --prompt {prompt}"] if run.checkpoints else []
    return [
        "what to run next:",
        *activation,
        *written,
        f"  go on        {launch} --save {quoted} --resume auto{more}{extra}",
        *(f"               ({words})" for words in (where, remark) if words),
        f"  real text    {launch} {real}",
        f"  all curves   tensorboard --logdir {quoted}/tensorboard",
    ]


def _longer(run: Run) -> tuple[str, str]:
    """Flags that give a finished run as many steps again, and what its learning rate does then.

    The decay is drawn out over all steps, as if the run had been meant to be so long: at the end of the old
    decay the rate is next to nothing, and so would be what more steps teach. On the quick start the loss does
    not jump with the rate, and the validation perplexity falls from 212 to 170.
    """
    if unfinished(run):
        return "", ""
    try:
        config = load(run.folder / RUN_CONFIG)
    except UserError:
        return "", ""
    steps = 2 * run.last_step
    flags = {"train_iters": steps}
    if config.optimizer.lr_decay_iters is not None and config.optimizer.lr_decay_style != "constant":
        flags["lr_decay_iters"] = steps
    words = "".join(f" --{name.replace('_', '-')} {value}" for name, value in flags.items())
    return words, _rates(config, replace(config, **flags), run.last_step)


def _rates(before: Config, after: Config, step: int) -> str:
    old, new, last = (
        f"{learning_rate(at, config):.3g}"
        for at, config in ((step, before), (step + 1, after), (2 * step, after))
    )
    if old == new == last:
        return f"the learning rate stays at {old}"
    return f"the learning rate goes from {old} back to {new} at step {step + 1}, then down to {last}"
