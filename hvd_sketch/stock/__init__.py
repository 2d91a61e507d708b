"""The full exchange behind the two calls that *stock* Horovod makes for each gradient.

Horovod calls ``compress(gradient)`` for every parameter as its gradient gets ready, and
``decompress(reduced, ctx)`` for every parameter afterwards, each rank in an order of its own,
and tells neither the parameter nor the step. A collective inside ``decompress`` would wait for
a rank that waits for another one. So ``compress`` only notes the gradient and hands Horovod a
token of one element; every ``compress`` of a step precedes every ``decompress`` on every rank,
so the first ``decompress`` runs the whole exchange, in the order of names, and writes all
updates into the gradients themselves; the others have nothing left to do.

Which parameter a gradient belongs to is known by identity: what arrives is ``p.grad`` itself.
The optimizer is the one that holds this compressor, found once among the live objects.
"""

from hvd_sketch.stock.client import Accompany, Client, Companion, Compressing, Follow, Ticket, accompany, alone
from hvd_sketch.stock.desk import client_of, compress, decompress, exchange_of
from hvd_sketch.stock.preparing import prepare, prepared_by

__all__ = [
    "Accompany",
    "Client",
    "Companion",
    "Compressing",
    "Follow",
    "Ticket",
    "accompany",
    "alone",
    "client_of",
    "compress",
    "decompress",
    "exchange_of",
    "prepare",
    "prepared_by",
]
