"""What a run takes its batches from: a loader, which may fail now and then."""

from collections.abc import Callable

from pipeline.data.loader import Batch, Loader
from pipeline.errors import UserError

RELOADS = 3  # times in a row that a loader which failed is begun anew


class Batches:
    """Batches without end. Where the loader fails, `say` is told, and it is begun anew at its place, a few times."""

    def __init__(self, loader: Loader, say: Callable[[str], object]) -> None:
        self.loader, self.say, self._batches = loader, say, iter(loader)

    def __next__(self) -> Batch:
        for attempt in range(RELOADS + 1):
            try:
                return next(self._batches)
            except UserError:  # trying again would not help
                raise
            except Exception as error:
                if attempt == RELOADS:
                    raise RuntimeError(f"the loader failed {RELOADS + 1} times in a row: {error}") from error
                self.say(
                    f"warning: the loader failed ({str(error) or type(error).__name__}); it is begun anew at its place"
                )
                self._batches = iter(self.loader)
        raise AssertionError
