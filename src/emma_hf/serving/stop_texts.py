"""Text that ends before the first of its stop texts, also where it arrives in pieces."""


class StopTextFilter:
    """Passes text on as soon as it cannot be the beginning of a stop text any more.

    Args:
        stop_texts: texts that end the answer, none empty. They are not passed on.
    """

    def __init__(self, stop_texts: tuple[str, ...]) -> None:
        self._stop_texts = stop_texts
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take the next piece. Returns what can be shown now; nothing after a stop text."""
        if self.stopped:
            return ""
        text = self._held + text
        starts = [start for stop in self._stop_texts if (start := text.find(stop)) >= 0]
        self.stopped = bool(starts)
        end = min(starts) if starts else len(text) - self._length_held_back(text)
        self._held = text[end:]
        return text[:end]

    def finish(self) -> str:
        """No piece follows. Returns what was held back and is no stop text."""
        return "" if self.stopped else self._held

    def _length_held_back(self, text: str) -> int:
        beginnings = (stop[:length] for stop in self._stop_texts for length in range(len(stop) - 1, 0, -1))
        return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
