"""Numbers in words, as every screen of the dashboard writes them; an unknown one is n/a."""

import time


def clock(seconds: float) -> str:
    """0:42, 12:03, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def time_of_day(when: float, now: float) -> str:
    local = time.localtime(when)
    days = (time.mktime((*local[:3], 12, 0, 0, 0, 0, -1)) - time.mktime((*time.localtime(now)[:3], 12, 0, 0, 0, 0, -1)))
    later = round(days / 86400)
    return time.strftime("%H:%M", local) + (f" in {later} days" if later > 1 else " tomorrow" if later else "")


def figure(value: float | None, digits: int = 4) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"


def rate(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2e}".replace("e-0", "e-")


def percent(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.0%}"


def gib(num_bytes: int | None) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes else "n/a"


def file_size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.2f} GiB"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
