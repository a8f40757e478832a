import io

from chainfed_engine.cli.progress import byte_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bytes_are_reported_each_tenth_without_a_terminal() -> None:
    stream = io.StringIO()
    with byte_progress("convert", stream) as progress:
        for done in range(0, 1001, 5):
            progress("head", done, 1000)
        progress("nothing", 0, 0)
    assert len(stream.getvalue().splitlines()) == 11
    stream = Terminal()
    with byte_progress("convert", stream) as progress:
        progress("layer 3", 500, 1000)
    assert "layer 3" in stream.getvalue()
