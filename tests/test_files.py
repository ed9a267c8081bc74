import resource
import signal

import pytest

from taming_jax.files import Appended, write_whole


@pytest.fixture
def limited():
    """A bound on the size of files, at which a write ends half done, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_is_written_whole_or_left_as_it_was(tmp_path, limited):
    file = tmp_path / "file"
    write_whole(file, b"old")
    limited(50)
    with pytest.raises(OSError, match="too large"):
        write_whole(file, bytes(100))
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
    limited(100)
    write_whole(file, bytes(100))
    assert file.read_bytes() == bytes(100)


def test_a_file_grows_by_whole_pieces(tmp_path, limited):
    path = tmp_path / "folder" / "file"
    file = Appended(path)
    limited(25)
    for _ in range(2):
        file.add(b"0123456789")
        file.flush()
    for _ in range(2):
        file.add(b"abcdefghij")
        with pytest.raises(OSError, match="too large"):
            file.flush()
        assert path.read_bytes() == b"0123456789" * 2 and file.waiting
    limited(100)
    with path.open("ab") as torn:  # as if not even the cutting had succeeded
        torn.write(b"abc")
    file.flush()
    assert path.read_bytes() == b"0123456789" * 2 + b"abcdefghij" * 2 and not file.waiting
    again = Appended(path)
    again.add(b"more")
    again.flush()
    assert path.read_bytes().endswith(b"ijmore")
