from typing import NamedTuple

class Places(NamedTuple):
    even_and_zero_pads: int
    legal: int
    right_rate: int
    pages: list[int]
    other_rate: list[int]

def search_pages(
    buffer: object, tsc_hz: int, within_ppm: int, newest_tsc: int | None = None, places_max: int = 1024
) -> Places: ...
