"""One answer in the making: its tokens, how many of them the model has seen, and the blocks that hold their rows."""

from __future__ import annotations

from enum import Enum, auto

from torch import Tensor

from benthic.inference.completion import Completion
from benthic.inference.form import Form
from benthic.inference.prefix import Prefix
from benthic.model.sampling import Sampler, SamplingParams


class Status(Enum):
    """Where a request stands."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Request:
    """`tokens` are the prompt and what was drawn; rows of the first `computed` of them lie in `blocks`.

    `rank` orders requests: the smallest is served first and given up last. `leader` is the request whose prompt this
    one shares (n > 1): it waits until those blocks are filled. Blocks that others may find count as its `owner`'s.
    Prediction layers hold rows of positions below `predicted` (0: none yet), and go on from the states `carried`, by
    the number of layers they went through; whether they follow this request at all is open (`follows` None) until its
    first step.
    """

    def __init__(
        self,
        request_id: int,
        prompt: list[int],
        sampler: Sampler,
        rank: int,
        salt: Prefix,
        index: int = 0,
        leader: Request | None = None,
    ) -> None:
        self.id, self.rank, self.leader = request_id, rank, leader
        self.sampler = sampler
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.status = Status.WAITING
        self.computed = 0
        self.blocks: list[int] = []
        self.drafts: list[int] = []
        self.predicted = 0
        self.carried: dict[int, Tensor] = {}
        self.follows: bool | None = None
        self.completion = Completion(prompt, index)
        self.form: Form | None = None
        self.owner = ""
        self._prefixes = [salt]

    @property
    def params(self) -> SamplingParams:
        """What was asked for."""
        return self.sampler.params

    @property
    def remaining(self) -> int:
        """Tokens that the model has not seen."""
        return len(self.tokens) - self.computed

    @property
    def tokens_left(self) -> int:
        """How many more tokens may be drawn."""
        return self.params.max_tokens - (len(self.tokens) - self.prompt_length)

    @property
    def has_ended(self) -> bool:
        """Whether its answer is complete, or failed."""
        return self.completion.finish_reason is not None

    @property
    def is_decoding(self) -> bool:
        """Whether all but the last token have been seen, and that one was drawn."""
        return self.remaining == 1 and len(self.tokens) > self.prompt_length

    def put_back(self) -> None:
        """Forget all rows; tokens stay."""
        self.blocks, self.drafts, self.carried = [], [], {}
        self.computed = self.predicted = 0
        self.follows = None

    @property
    def may_share(self) -> bool:
        """Whether blocks of others can stand in for its own computation: not where something is wanted of each of the
        prompt's tokens."""
        return self.params.prompt_logprobs is None and not self.params.routed_experts

    def prefix(self, block: int, block_size: int) -> Prefix:
        """What one of its full blocks stands for."""
        while len(self._prefixes) <= block + 1:
            begin = (len(self._prefixes) - 1) * block_size
            self._prefixes.append(self._prefixes[-1].followed_by(self.tokens[begin : begin + block_size]))
        return self._prefixes[block + 1]

    def adopt(self, block: int, prefix: Prefix) -> None:
        """Go on from the equal prefix under which one of its blocks is known: what comes behind it is then compared
        with what others have behind it, and no further back."""
        self._prefixes[block + 1] = prefix
