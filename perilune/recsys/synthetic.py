"""Interactions made up: a shop's funnel, where views tell taste, and large graphs that tell nothing.

No postponed annotations here: recipe validation reads them.
"""

# U users  I items  E pairs of a behavior

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from perilune.checks import require
from perilune.errors import DataError
from perilune.recsys.data import NONE, InteractionData, Interactions
from perilune.recsys.logs import EventLog
from perilune.recsys.splits import leave_last_out
from perilune.seeding import derive_seed

START = 1_700_000_000
"""Seconds since 1970 of the first possible event."""

DAY = 86_400
"""Seconds."""

_BLOCK = 2**21
"""Pairs that are drawn at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunnelConfig:
    """A shop in which people view what they like or what everybody sees, and cart and buy some of it."""

    num_users: int = 800
    """Users."""
    num_items: int = 600
    """Items."""
    factors: int = 8
    """Dimensions of taste; more are harder to learn."""
    taste: float = 2.5
    """How much taste decides what is viewed: its standard deviation in the logit of a view; 0 for nothing."""
    popularity: float = 0.7
    """Standard deviation of items' popularity in the same logit."""
    activity: float = 0.6
    """Standard deviation of the logarithm of how much users view."""
    views: float = 30.0
    """Views of an average user that come of taste and popularity."""
    noise: float = 0.2
    """Share of views that come of an item's popularity alone, whatever the taste."""
    carts: float = 0.3
    """Probability that what is viewed is carted, where the item and the taste for it are those of an average view."""
    purchases: float = 0.4
    """The same that what is carted is bought."""
    conversion: float = 1.0
    """Standard deviation of items' own part in the logits of carting and buying: some are looked at and not bought."""
    with_favorites: bool = False
    """Whether there is a behavior `fav` between `view` and `cart`."""
    unlogged: float = 0.3
    """Share of purchases of which the log has no other event, as of people who were not logged in."""
    non_buyers: float = 0.1
    """Share of users who buy nothing, whatever they view."""
    cold_users: float = 0.1
    """Share of users who buy once at most; as that is held out, training knows their taste by views alone."""
    days: float = 60.0
    """Days over which views spread; purchases follow within days."""
    seed: int = 0
    """Decides everything else."""

    def __post_init__(self) -> None:
        for name in ("num_users", "num_items", "factors"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("taste", "popularity", "activity", "conversion"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, "at least 0", value)
        require(0 < self.views < self.num_items / 2, "views", "above 0 and below half of num_items", self.views)
        require(0 < self.days < math.inf, "days", "above 0", self.days)
        for name in ("carts", "purchases"):
            require(0 < getattr(self, name) < 1, name, "in (0, 1)", getattr(self, name))
        for name in ("noise", "unlogged", "non_buyers", "cold_users"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        shares = self.non_buyers + self.cold_users
        require(shares <= 1, "non_buyers + cold_users", "at most 1", shares)


def funnel(config: FunnelConfig) -> InteractionData:
    """Make up a shop, and hold out each buyer's last purchase.

    Other behaviors of held-out purchases are left in, as in published data; `InteractionData.clean` takes them out.
    By default that is so for 70 % of them, which is what the rule of evidence lives on: it finds 0.68 of purchases
    within ten places among all items, and 0.00 in clean data. Popularity finds 0.11 in both, similarity of items by
    purchases alone 0.18, and by all behaviors 0.39 and 0.30.

    Args:
        config: the shop; it decides every number.

    Raises:
        DataError: nobody buys anything.
    """
    return leave_last_out(funnel_log(config), min_target=1, seed=config.seed)


def funnel_log(config: FunnelConfig) -> EventLog:
    """The same as events with times, for protocol "temporal".

    A user z and an item y have the taste z.y. Views are Bernoulli of sigmoid(a_u + taste * z.y + popularity), or of
    popularity alone (`noise`); of those fav, cart and buy are, one out of the other, with logits of taste and of the
    item's own conversion. An item's number tells nothing.

    Raises:
        DataError: nobody buys anything.
    """
    shop = _Shop.of(config)
    users, items, tastes = shop.views()
    if not len(users):
        raise DataError("nobody views anything in this shop; raise views or num_users")
    steps = [("fav", 0.5)] if config.with_favorites else []
    steps += [("cart", config.carts), ("buy", config.purchases)]
    generator = _generator(config.seed, "funnel")
    times = START + generator.integers(0, max(1, int(config.days * DAY)), len(users))
    stage = np.zeros(len(users), np.int16)  # the last behavior of the funnel that a pair came to
    arrivals = [times]
    for code, (name, share) in enumerate(steps, start=1):
        logit = (
            math.log(share / (1 - share)) + 0.5 * config.taste * (tastes - tastes.mean()) + shop.conversion[name][items]
        )
        stage[(stage == code - 1) & (generator.random(len(users)) < _sigmoid(logit))] = code
        arrivals.append(arrivals[-1] + generator.exponential(DAY, len(users)).astype(np.int64))
    last = len(steps)
    is_bought = (stage == last) & ~shop.buys_nothing[users]
    stage[(stage == last) & ~is_bought] = last - 1
    order = np.flatnonzero(is_bought)
    order = order[np.lexsort((arrivals[last][order], users[order]))]
    is_first = np.ones(len(order), bool)
    is_first[1:] = users[order[1:]] != users[order[:-1]]
    gone = order[~is_first & shop.buys_once[users[order]]]
    stage[gone] = last - 1
    is_unlogged = (stage == last) & (generator.random(len(users)) < config.unlogged)
    chosen = [np.flatnonzero((stage >= code) & ((code == last) | ~is_unlogged)) for code in range(last + 1)]
    if not len(chosen[last]):
        raise DataError("nobody buys anything in this shop; raise views, carts or purchases")
    return EventLog.of(
        np.concatenate([users[at] for at in chosen]),
        np.concatenate([items[at] for at in chosen]),
        np.repeat(np.arange(last + 1), [len(at) for at in chosen]),
        np.concatenate([times[at] for times, at in zip(arrivals, chosen, strict=True)]),
        user_ids=np.arange(config.num_users),
        item_ids=np.arange(config.num_items),
        behaviors=("view", *(name for name, _ in steps)),
    )


def random_graph(
    num_users: int, num_items: int, edges: Mapping[str, int], *, seed: int = 0, skew: float = 0.8
) -> InteractionData:
    """A graph of a given size without any sense, in time and memory linear in its edges.

    Args:
        num_users: U.
        num_items: I.
        edges: number of pairs of each behavior, the target last; at most half of all there are.
        seed: decides which.
        skew: s of Zipf's law: the n-th of the most popular items has about n^-s of the first's pairs, the n-th of the
            most active users n^-(s/2); 0 for all alike.

    Returns:
        Data without times, whose test items, one for each user but for a few, are drawn as the others are.

    Raises:
        DataError: there are too many edges, or a number is out of range.
    """
    if num_users < 1 or num_items < 1 or not 0 <= skew < math.inf:
        raise DataError(f"users and items must be at least 1, skew at least 0, got {num_users}, {num_items} and {skew}")
    user_numbers = _generator(seed, "user numbers").permutation(num_users).astype(np.int32)
    item_numbers = _generator(seed, "item numbers").permutation(num_items).astype(np.int32)
    behaviors: dict[str, Interactions] = {}
    for name, count in edges.items():
        if not 0 <= count <= num_users * num_items / 2:
            raise DataError(f"{name}: {count} edges, where 0 to half of {num_users} x {num_items} were expected")
        keys = _distinct_pairs(_generator(seed, f"edges {name}"), user_numbers, item_numbers, count, skew)
        behaviors[name] = Interactions(
            users=(keys // num_items).astype(np.int32), items=(keys % num_items).astype(np.int32)
        )
    test = item_numbers[_zipf(_generator(seed, "test"), num_items, num_users, skew)]
    data = InteractionData(
        num_users=num_users, num_items=num_items, behaviors=behaviors, test=np.full(num_users, NONE, np.int32)
    )
    test[data.target.users[data.target.has(test)]] = NONE
    return replace(data, test=test)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shop:
    config: FunnelConfig
    users: np.ndarray
    """`[U, factors]` float32."""
    items: np.ndarray
    """`[I, factors]` float32."""
    activity: np.ndarray
    """`[U]`, of mean 1."""
    popularity: np.ndarray
    """`[I]`, part of a logit."""
    conversion: dict[str, np.ndarray]
    """`[I]` by behavior, part of a logit."""
    buys_nothing: np.ndarray
    """`[U]` bool."""
    buys_once: np.ndarray

    @classmethod
    def of(cls, config: FunnelConfig) -> "_Shop":
        generator = _generator(config.seed, "shop")
        users, items = config.num_users, config.num_items
        activity = np.exp(config.activity * generator.standard_normal(users))
        place = generator.permutation(users) / users
        return cls(
            config=config,
            users=generator.standard_normal((users, config.factors), np.float32) / math.sqrt(config.factors),
            items=generator.standard_normal((items, config.factors), np.float32),
            activity=(activity / activity.mean()).astype(np.float32),
            popularity=(config.popularity * generator.standard_normal(items)).astype(np.float32),
            conversion={name: config.conversion * generator.standard_normal(items) for name in ("fav", "cart", "buy")},
            buys_nothing=place < config.non_buyers,
            buys_once=place >= 1 - config.cold_users,
        )

    def views(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Users, items and tastes of the pairs that are viewed."""
        generator = _generator(self.config.seed, "views")
        offset = self._offset()
        noise = np.exp(self.popularity)
        noise *= self.config.views * self.config.noise / (1 - self.config.noise) / noise.sum()
        rows = max(1, _BLOCK // self.config.num_items)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for start in range(0, self.config.num_users, rows):
            part = slice(start, start + rows)
            tastes = self.users[part] @ self.items.T
            liked = _sigmoid(self._logits(tastes, part) + offset)
            seen = np.minimum(noise * self.activity[part, None], 1)
            users, items = np.nonzero(generator.random(liked.shape, np.float32) < liked + seen - liked * seen)
            found.append((users + start, items, tastes[users, items]))
        users, items, tastes = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return users, items, tastes

    def _logits(self, tastes: np.ndarray, part: slice) -> np.ndarray:
        return self.config.taste * tastes + self.popularity + np.log(self.activity[part, None])

    def _offset(self) -> float:
        """What makes `views` of the first users' logits, by halving."""
        part = slice(0, max(1, min(self.config.num_users, _BLOCK // 8 // self.config.num_items)))
        logits = self._logits(self.users[part] @ self.items.T, part)
        lowest, highest = -50.0, 50.0
        for _ in range(40):
            middle = (lowest + highest) / 2
            if _sigmoid(logits + middle).sum(1).mean() < self.config.views:
                lowest = middle
            else:
                highest = middle
        return lowest


def _distinct_pairs(
    generator: np.random.Generator, users: np.ndarray, items: np.ndarray, count: int, skew: float
) -> np.ndarray:
    """Numbers u * I + i of `count` pairs in order, `[count]` int64."""
    keys = np.empty(0, np.int64)
    for attempt in range(64):
        missing = count - len(keys)
        if not missing:
            break
        draws = missing + missing // 4 + 16
        bend = skew if attempt < 4 else 0.0  # where the popular ones are used up, the others serve
        more = users[_zipf(generator, len(users), draws, bend / 2)].astype(np.int64)
        more *= len(items)
        more += items[_zipf(generator, len(items), draws, bend)]
        keys = np.concatenate((keys, more))
        keys.sort()
        is_new = np.ones(len(keys), bool)
        np.not_equal(keys[1:], keys[:-1], out=is_new[1:])
        keys = keys[is_new]
        if len(keys) > count:
            keys = np.delete(keys, generator.choice(len(keys), len(keys) - count, replace=False))
    return keys


def _zipf(generator: np.random.Generator, most: int, count: int, skew: float) -> np.ndarray:
    """`[count]` places in [0, most), the n-th in proportion to about n^-skew: the inverse of its integral."""
    x = generator.random(count)
    if abs(skew - 1) < 1e-6:
        x = np.exp(x * math.log(most + 1))
    else:
        x *= (most + 1) ** (1 - skew) - 1
        x += 1
        np.power(x, 1 / (1 - skew), out=x)
    return np.minimum(x.astype(np.int64) - 1, most - 1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))


def _generator(seed: int, use: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, "recsys", "synthetic", use))
