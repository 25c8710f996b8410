"""Lines for a person."""

import os


def say(message: str) -> None:
    """Print a line, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 45s, 3m20s, 2h05m, 4d03h."""
    if seconds != seconds:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
