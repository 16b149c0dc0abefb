"""From a log to data: who stays, and which purchase each user is judged by."""

# E events  U users  I items

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from perilune.errors import DataError
from perilune.recsys.data import NONE, InteractionData, Interactions, pair_keys
from perilune.recsys.ids import pair_chances
from perilune.recsys.logs import EventLog
from perilune.seeding import derive_seed


def k_core(log: EventLog, *, users: int, items: int, on: Literal["target", "any"] = "target") -> EventLog:
    """The largest part of a log in which every user has `users` items and every item has `items` users.

    Those that have fewer go with all their events, which takes events from others, until nothing changes.

    Args:
        log: events; those who stay are numbered anew.
        users: least number of different items of a user, 0 for no matter.
        items: least number of different users of an item.
        on: whether events of the target count, or of any behavior.

    Raises:
        DataError: nothing is left.
    """
    counted = log.is_target if on == "target" else np.ones(len(log), bool)
    pairs = np.unique(pair_keys(log.users[counted], log.items[counted], len(log.item_ids)))
    of_user, of_item = pairs // len(log.item_ids), pairs % len(log.item_ids)
    user_stays, item_stays = np.ones(len(log.user_ids), bool), np.ones(len(log.item_ids), bool)
    while True:
        both = user_stays[of_user] & item_stays[of_item]
        of_user, of_item = of_user[both], of_item[both]
        enough_users = np.bincount(of_user, minlength=len(user_stays)) >= users
        enough_items = np.bincount(of_item, minlength=len(item_stays)) >= items
        if (enough_users >= user_stays).all() and (enough_items >= item_stays).all():
            break
        user_stays &= enough_users
        item_stays &= enough_items
    stays = user_stays[log.users] & item_stays[log.items]
    if not stays.any():
        raise DataError(f"nothing is left of a log of {len(log)} events where users need {users}, items {items} ({on})")
    return replace(
        log,
        users=(np.cumsum(user_stays) - 1)[log.users[stays]].astype(np.int32),
        items=(np.cumsum(item_stays) - 1)[log.items[stays]].astype(np.int32),
        behavior=log.behavior[stays],
        times=None if log.times is None else log.times[stays],
        user_ids=log.user_ids[user_stays],
        item_ids=log.item_ids[item_stays],
    )


def keep_all(log: EventLog) -> InteractionData:
    """Hold nothing out: for a model that is put to use, and is judged by another that was trained like it."""
    return _split(log, np.ones(len(log), bool), np.zeros(0, np.int64))


def leave_last_out(log: EventLog, *, min_target: int = 2, seed: int = 0) -> InteractionData:
    """Hold out the item that each user bought last for the first time; everything else is training.

    What was viewed or carted of it stays, and so do events that came later: `InteractionData.clean` takes the first
    out, and `temporal` both. Users with too few purchases, or none, stay in the graph and have no test item.

    Args:
        log: events.
        min_target: least number of different items bought of users who have one held out; 1 leaves some of them
            without any purchase in training.
        seed: decides between purchases of one time, and alone where there are no times: there a purchase is held out by
            what user and item are called (`pair_chances`), so that a log to which events were added holds out the same,
            or something new. Users who had fewer than `min_target` before are the exception.

    Raises:
        DataError: `min_target` is less than 1.
    """
    if min_target < 1:
        raise DataError(f"min_target must be at least 1, got {min_target}")
    order = _in_time(log, np.flatnonzero(log.is_target), seed)
    counts = np.bincount(log.users[order], minlength=len(log.user_ids))
    last = order[np.cumsum(counts)[counts >= min_target] - 1]
    kept = np.ones(len(log), bool)
    kept[last] = False
    return _split(log, kept, last)


def temporal(
    log: EventLog,
    *,
    quantile: float = 0.9,
    cutoff: int | None = None,
    per: Literal["global", "user"] = "global",
    seed: int = 0,
) -> InteractionData:
    """Protocol "temporal": what happened before a moment is training; the first purchase from then on is the test.

    Purchases are first ones of a user and an item, so that nothing held out was bought before. Events of any behavior
    from the moment on are in neither part. Users without a purchase from then on stay in the graph with what they did
    before, and have no test item; with `per="user"` those without any purchase have no such moment, and all that they
    did is training.

    `InteractionData.hold_out` makes validation in the same way out of what is left: by an earlier moment, before which
    lies the same share of the purchases that are left, of all or of each user's own.

    Args:
        log: events with times.
        quantile: in [0, 1), the share of purchases before the moment, at most; of all or of each user's own.
        cutoff: the moment itself in seconds since 1970, in place of `quantile`.
        per: whether the moment is one for all, or each user's own.
        seed: decides between first purchases of one time.

    Raises:
        DataError: there are no times or no purchases, an argument is out of range, or nothing happened before `cutoff`
            or after.
    """
    if log.times is None:
        raise DataError("protocol temporal needs times, and this log has none")
    if not 0 <= quantile < 1:
        raise DataError(f"quantile must be in [0, 1), got {quantile}")
    if cutoff is not None and per == "user":
        raise DataError("cutoff is one moment for all; users' own ones come of quantile")
    order = _in_time(log, np.flatnonzero(log.is_target), seed)
    if not len(order):
        raise DataError(f"protocol temporal needs events of {log.behaviors[-1]!r}, and this log has none")
    if cutoff is None:
        moments = _moments(log, order, quantile, per)
    else:
        first, last = int(log.times.min()), int(log.times.max())
        if not first < cutoff <= last:
            raise DataError(f"cutoff must be after {first} and at most {last}, the log's times, got {cutoff}")
        moments = np.full(len(log.user_ids), cutoff)
    is_after = log.times[order] >= moments[log.users[order]]
    before, after = order[~is_after], order[is_after]
    is_first = np.ones(len(after), bool)
    is_first[1:] = log.users[after[1:]] != log.users[after[:-1]]
    data = _split(log, log.times < moments[log.users], after[is_first])
    earlier = _moments(log, before, quantile if cutoff is None else len(before) / len(order), per)
    later = _pairs(log, np.sort(after[~is_first]), "later")
    return replace(data, moments=np.stack((earlier, moments)), later=later)


def _moments(log: EventLog, order: np.ndarray, share: float, per: Literal["global", "user"]) -> np.ndarray:
    """`[U]`, when a share of purchases, given by user and then by time, was over; never, where there are none."""
    assert log.times is not None
    times, moments = log.times[order], np.full(len(log.user_ids), np.iinfo(np.int64).max)
    if per == "user":
        counts = np.bincount(log.users[order], minlength=len(moments))
        chosen = np.cumsum(counts) - counts + np.floor(share * counts).astype(np.int64)
        moments[counts > 0] = times[chosen[counts > 0]]
    elif len(order):
        moments[:] = np.sort(times)[min(int(share * len(order)), len(order) - 1)]
    return moments


def _in_time(log: EventLog, events: np.ndarray, seed: int) -> np.ndarray:
    """Events by user and then by time, those of one time by `pair_chances`."""
    seed = derive_seed(seed, "recsys", "split")
    chance = pair_chances(seed, log.users[events], log.items[events], log.user_ids, log.item_ids)
    times = chance if log.times is None else log.times[events]
    return events[np.lexsort((chance, times, log.users[events]))]


def _split(log: EventLog, kept: np.ndarray, held_out: np.ndarray) -> InteractionData:
    """Data of the events at which `kept` `[E]` is true, and of the numbers of those that are held out."""
    behaviors = {
        name: _pairs(log, np.flatnonzero(kept & (log.behavior == code)), name)
        for code, name in enumerate(log.behaviors)
    }
    test = np.full(len(log.user_ids), NONE, np.int32)
    test[log.users[held_out]] = log.items[held_out]
    return InteractionData(
        num_users=len(log.user_ids),
        num_items=len(log.item_ids),
        behaviors=behaviors,
        test=test,
        user_ids=log.user_ids,
        item_ids=log.item_ids,
    )


def _pairs(log: EventLog, events: np.ndarray, name: str) -> Interactions:
    """Pairs of some events."""
    return Interactions.of(
        log.users[events],
        log.items[events],
        None if log.times is None else log.times[events],
        num_users=len(log.user_ids),
        num_items=len(log.item_ids),
        name=name,
    )
