"""What this process feeds to its devices in an epoch, wherever the ids of it lie."""

import dataclasses
from collections.abc import Iterator

from flax_lstm import data
from flax_lstm.config import DataConfig


@dataclasses.dataclass
class Feed:
    """Gives the batches of the parts of a corpus.

    Attributes:
      corpus: The data.
      lengths: Bucket lengths of the batches.
      config: Pipeline and batch size.
      local: Rows of each batch that this process feeds; all when None.
    """

    corpus: data.Corpus
    lengths: tuple[int, ...]
    config: DataConfig
    local: slice | None = None

    def __post_init__(self) -> None:
        self._fed: dict[str, data.Examples] = {}

    def batches(
        self, part: str, *, seed: int, epoch: int | None, start: int = 0
    ) -> Iterator[data.Batch]:
        """Returns the batches of an epoch, as `data.batches` does.

        Processes that share the rows all must call this, alike: they hand each other
        those that each of them feeds. Those of a fixed order are kept.
        """
        if not self.corpus.shared:
            return data.batches(
                self.corpus.parts[part],
                self.lengths,
                self.config,
                seed=seed,
                epoch=epoch,
                start=start,
                local=self.local,
            )
        rows = self.corpus.shared[part]
        plan = data.batch_plan(rows, self.lengths, self.config, seed=seed, epoch=epoch)
        plan = data.left_of(plan, start)
        fed = self._fed.get(part) if epoch is None else None
        if fed is None:
            fed = data.feed(rows, plan, self.local)
        if epoch is None:
            self._fed[part] = fed
        local = self.local or slice(0, self.config.batch_size)
        left = self.config.pipeline != "words"
        return data.fed_batches(fed, plan, local, left=left)
