"""Where the driver and the ranks of a stage leave word for each other.

A Ray actor, in a process of its own that must start fast: nothing heavy is imported here.
"""


class Mailbox:
    """Where the driver leaves its wish for the ranks, and the ranks their word for the driver. A Ray actor.

    Args:
        secret: of the ranks. Here, and not in Ray Train's configuration: Ray keeps and exports that as text.
        variables: of the environment, with credentials in them; here for the same reason.
    """

    def __init__(self, secret: bytes, variables: dict[str, str]) -> None:
        self._secret = secret
        self._variables = variables
        self._wish: str | None = None
        self._needs_s = 0.0
        self._places: dict[int, str] = {}
        self._begun = False
        self._ended: bool | None = None
        self._verdict: str | None = None

    def secret(self) -> bytes:
        """What the ranks know each other by."""
        return self._secret

    def variables(self) -> dict[str, str]:
        """What the driver has in its environment and the ranks need."""
        return self._variables

    def ask(self, reason: str) -> None:
        """Ask the ranks to save and stop."""
        self._wish = reason

    def wish(self, needs_s: float) -> str | None:
        """What the ranks are asked; rank 0 says with its question how many seconds saving and stopping would take."""
        self._needs_s = needs_s
        return self._wish

    def needs_s(self) -> float:
        """How many seconds saving and stopping would take."""
        return self._needs_s

    def join(self, rank: int, node: str) -> None:
        """A rank says on which node it runs."""
        self._places[rank] = node

    def places(self) -> dict[int, str]:
        """The nodes of the ranks that have joined."""
        return self._places

    def begin(self) -> None:
        """Rank 0 says that the first step is about to be taken."""
        self._begun = True

    def begun(self) -> bool:
        """Whether the first step was about to be taken."""
        return self._begun

    def end(self, finished: bool) -> None:
        """Rank 0 says how the ranks ended."""
        self._ended = finished

    def ended(self) -> bool | None:
        """Whether the ranks came to their end, or stopped because they were asked to; None: neither."""
        return self._ended

    def condemn(self, message: str) -> None:
        """A rank says why it ends the ranks."""
        self._verdict = self._verdict or message

    def verdict(self) -> str | None:
        """Why a rank ended the ranks."""
        return self._verdict
