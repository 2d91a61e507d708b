"""What ends a rank's part against its will."""


class ServerLost(RuntimeError):
    """The server has ended, or does not answer any more. There is no other: begin again from a checkpoint."""


class TurnedAway(RuntimeError):
    """The server takes no more messages of this worker."""


class WorkersLost(RuntimeError):
    """No worker is left, and none had done its part."""
