import pytest

from transfer_jax.data.paths import data_root, require


def test_names_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("TRANSFER_JAX_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="TRANSFER_JAX_DATA is not set"):
        data_root()
    monkeypatch.setenv("TRANSFER_JAX_DATA", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="names no directory"):
        data_root()
    monkeypatch.setenv("TRANSFER_JAX_DATA", str(tmp_path))
    (tmp_path / "here").mkdir()
    assert require("here") == tmp_path / "here"
    with pytest.raises(FileNotFoundError, match="Folders found: here"):
        require("there")
    with pytest.raises(FileNotFoundError, match=r"here.a\.txt is missing"):
        require("here", "a.txt")
    (tmp_path / "here" / "a.txt").write_text("x")
    assert require("here", "a.txt").read_text() == "x"
