from taming_jax.cli import dataset
from tests.data import pictures


def test_the_command_describes_a_dataset(tmp_path, capsys, monkeypatch):
    contents, labels = pictures.make_split(30)
    parts = {"train": (contents, labels), "test": (contents[:4] + contents[:1], labels[:5])}
    pictures.write_folder(tmp_path / "data", parts)
    arguments = ["--config", "folder", "--data.image-size", "32", "--data.path", tmp_path / "data"]
    arguments += ["--data.cache", tmp_path / "cache", "--out", tmp_path / "sheet.png"]
    monkeypatch.setattr("sys.argv", ["dataset.py", *map(str, arguments)])
    dataset.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("test: 5 images of 32x32x3, mean and ") for line in lines)
    (row,) = (line.split() for line in lines if line.startswith("zèbre"))
    assert int(row[1]) + int(row[2]) == 10 and row[3] == "0"
    assert "1 duplicates within test" in lines and "0 duplicates within train" in lines
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
