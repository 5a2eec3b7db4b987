"""Write rows to train on: dates in words, and as JSON. `python examples/make_data.py dates.jsonl`

Made up and small: enough to see a speculator learn in a minute or two. Prompt format: raw.
"""

from __future__ import annotations

import argparse
import calendar
import json
import random
from datetime import date, timedelta
from pathlib import Path

PATTERNS = ("{day} {month} {year}", "{month} {day}, {year}", "the {day}. of {month} {year}", "{month} {day} {year}")


def row(generator: random.Random) -> dict[str, str]:
    """One example."""
    when = date(1950, 1, 1) + timedelta(days=generator.randrange(30_000))
    text = generator.choice(PATTERNS).format(day=when.day, month=calendar.month_name[when.month], year=when.year)
    answer = {"year": when.year, "month": when.month, "day": when.day, "iso": when.isoformat()}
    return {"prompt": f"Write the date as JSON.\nDate: {text}\nJSON:", "completion": " " + json.dumps(answer)}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a .jsonl file to write")
    parser.add_argument("--rows", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="other rows for another seed")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)  # noqa: S311 - not a secret
    lines = [json.dumps(row(generator)) for _ in range(arguments.rows)]
    arguments.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{arguments.rows} rows in {arguments.file}")  # noqa: T201


if __name__ == "__main__":
    main()
