"""A rank's log has all sessions, and the error that ended one."""

import pytest

from inrank_megatron.training.rank_log import LOG, rank_log


def test_it_is_appended_to_and_has_the_traceback(tmp_path, capfd):
    with rank_log(tmp_path, rank=3, device="cpu"):
        LOG.info("step %d", 10)
    with pytest.raises(ValueError), rank_log(tmp_path, rank=3, device="cpu"):
        raise ValueError("planted")
    LOG.info("outside")
    text = (tmp_path / "logs" / "rank_3.log").read_text()
    assert text.count("begins on ") == 2 and "step 10" in text and "ends\n" in text
    assert "ends with an error\nTraceback" in text and "ValueError: planted" in text
    assert "outside" not in text and capfd.readouterr() == ("", "")


def test_a_full_disk_adds_no_word_to_the_error(tmp_path, capfd):
    """The file is one that is always full."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").symlink_to("/dev/full")
    with pytest.raises(OSError, match="planted"), rank_log(tmp_path, rank=0, device="cpu"):
        raise OSError("planted")
    assert capfd.readouterr() == ("", "")
