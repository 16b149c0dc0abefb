"""Sentences that state facts, and the way back from sentences to facts: what a corpus says, a reader can read."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PHRASES: Mapping[str, tuple[str, ...]] = {
    "Country": ("It belongs to {}.", "The country is {}.", "It lies within the borders of {}."),
    "Continent": ("It is counted among the countries of {}.", "Its continent is {}.", "On the map it is part of {}."),
    "Capital": ("Its capital is {}.", "The seat of government is {}.", "Capital city: {}"),
    "Population": ("About {} people live there.", "Population: {}", "It has {} inhabitants."),
    "Area km2": ("It covers {} square kilometers.", "Area: {} km2", "Its surface measures {} km2."),
    "Currency code": ("Prices are quoted in {}.", "The code of its currency is {}.", "Currency code: {}"),
    "Currency name": ("People pay with the {}.", "The money is called {}.", "Name of the currency: {}"),
    "ISO code": ("In ISO lists it is {}.", "ISO 3166 abbreviates it as {}.", "Three-letter code: {}"),
    "Web domain": ("Its web addresses end in {}", "Internet domain: {}", "Sites from there use the ending {}"),
    "Largest neighbor": (
        "Its largest neighbor is {}.",
        "Of the countries at its border, the largest is {}.",
        "Largest bordering country: {}",
    ),
    "Time zone": ("Clocks follow {}.", "Time zone: {}", "Its zone in the time zone database is {}."),
    "Latitude": ("Its latitude is {}.", "Latitude: {}", "It lies at {} degrees of latitude."),
    "Longitude": ("Its longitude is {}.", "Longitude: {}", "It lies at {} degrees of longitude."),
    "Airport name": ("It is called {}.", "Its full name is {}.", "Name: {}"),
    "City served": ("It serves {}.", "Travelers use it for {}.", "City served: {}"),
    "Region": ("The region is {}.", "It is found in {}.", "Region: {}"),
    "Elevation ft": ("It stands {} feet above the sea.", "Elevation: {} ft", "The field is {} feet high."),
    "ICAO code": ("Pilots know it as {}.", "Its ICAO code is {}.", "ICAO: {}"),
}
_PATTERNS = {
    column: re.compile(
        "^(?:" + "|".join(re.escape(phrase).replace(r"\{\}", "(.+)", 1) for phrase in phrases) + ")$", re.MULTILINE
    )
    for column, phrases in _PHRASES.items()
}


def state_fact(column: str, value: str, choice: int) -> str:
    """Return a sentence without a line break.

    Args:
        column: a column's name; an unknown one gets a plain `column: value`.
        value: the cell; what is a whole number may be written with thousands' commas.
        choice: picks the wording; any number at least 0.
    """
    phrases = _PHRASES.get(column, (f"{column}: {{}}",))
    shown = f"{int(value):,}" if choice // len(phrases) % 2 and column in ("Population", "Area km2") else value
    return phrases[choice % len(phrases)].replace("{}", shown, 1)


def read_fact(column: str, page: str) -> str | None:
    """Return the value that the first sentence about a column gives, as it is written there; None if there is none."""
    pattern = _PATTERNS.get(column) or re.compile(f"^{re.escape(column)}: (.+)$", re.MULTILINE)
    found = pattern.search(page)
    return next(value for value in found.groups() if value is not None).strip() if found else None
