"""Transaction: the course of one load or reload, which takes effect as a whole or not at all, whatever interrupts it.

    open ──finish──► prepare, vote ──┬──► committing ──► finished ──► tell
                                     └──► aborting ────► aborted

Everything that can fail happens while the transaction is open. Which way it then goes is one assignment to `state`;
what follows may be interrupted between any two instructions, and is done again from the start until it is through.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from ..errors import QTensorError
from ..interrupts import in_spite_of_interrupts

State = Literal["open", "committing", "aborting", "finished", "aborted"]


class Transaction(ABC):
    """The state of one load or reload and the order of its steps, which a subclass fills in.

    `commit`, `roll_back` and `close` exchange buffers and objects that exist and were checked before. Each may be
    called again after an interrupt stopped it anywhere, and then does what is left.
    """

    state: State = "open"

    @abstractmethod
    def prepare(self) -> None:
        """Everything that can fail: completeness, values, the report, warnings. Nothing in use changes for good."""

    @abstractmethod
    def vote(self) -> None:
        """Wait until all ranks are prepared. Raises if one of them is not."""

    @abstractmethod
    def withdraw(self, error: BaseException | None) -> bool:
        """Tell other ranks that this one gives up. False if all have voted: then this one has to go through with it.
        May be repeated."""

    @abstractmethod
    def commit(self) -> None:
        """Make the new state the one in use."""

    @abstractmethod
    def roll_back(self) -> None:
        """Make everything as it was before."""

    @abstractmethod
    def close(self, state: State) -> None:
        """Let go of hooks, threads and memory."""

    @abstractmethod
    def tell(self) -> None:
        """It is finished, and all is closed: what users want to hear of it. Raises nothing of its own."""

    @property
    def undecided(self) -> bool:
        return self.state == "open"

    @property
    def unsettled(self) -> bool:
        """Is it decided how it ends, and has it not ended? Only an interrupt leaves it so; `settle` goes on."""
        return self.state in ("committing", "aborting")

    def finish(self) -> None:
        """Prepare, vote, commit, close, tell. An error of the first two gives everything up and is raised."""
        if self.state != "open":
            raise QTensorError(f"this session is {self.state}, not open")
        try:
            self.prepare()
            self.vote()
            self.state = "committing"
        except BaseException as error:
            # An interrupt may come when all ranks have voted already, and even after the assignment.
            self.abort(error)
            self._tell_if_finished()
            raise
        self.settle()
        self.tell()

    def abort(self, error: BaseException | None = None) -> None:
        """Give up, because of `error` if there is one, unless it is decided already how it ends."""
        try:
            in_spite_of_interrupts(lambda: self._give_up(error))
        except Exception as late:
            if error is None:
                raise
            error.add_note(f"While this was given up: {type(late).__name__}: {late}")

    def settle(self) -> None:
        """Go through with what is decided. An interrupt is raised when it is done."""
        in_spite_of_interrupts(self._go_through)

    def _give_up(self, error: BaseException | None) -> None:
        if self.state == "open":
            self.state = "aborting" if self.withdraw(error) else "committing"
        self._go_through()

    def _tell_if_finished(self) -> None:
        if self.state == "finished":
            self.tell()

    def _go_through(self) -> None:
        if self.state == "committing":
            self.commit()
            self.close("finished")
            self.state = "finished"
        elif self.state == "aborting":
            self.roll_back()
            self.close("aborted")
            self.state = "aborted"
