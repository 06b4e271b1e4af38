"""``python -m tests.fuzz 12345`` runs one case and prints it; ``... 0 1000`` those of a range."""

from __future__ import annotations

import sys
import time
import traceback

from tests.fuzz.cases import look_at, make


def main() -> int:
    """Run what the arguments say; the exit status is 1 where something is wrong."""
    numbers = [int(text) for text in sys.argv[1:]]
    if len(numbers) == 1:
        print(make(numbers[0]).words)
        print(look_at(numbers[0]) or "nothing is wrong with it")
        return 0
    found, start, slow = 0, time.monotonic(), []
    for number in range(*numbers):
        begin = time.monotonic()
        try:
            problem = look_at(number)
        except Exception as error:
            problem = f"{number}\nthe generator: {type(error).__name__} {traceback.format_exc()}"
        slow.append((time.monotonic() - begin, number))
        if problem is not None:
            found += 1
            print(problem, end="\n\n", flush=True)
        if len(slow) % 1000 == 0:
            print(f"{len(slow)} cases, {found} found", file=sys.stderr, flush=True)
    print(f"{found} of {len(slow)} cases in {time.monotonic() - start:.1f} s")
    print("longest:", *(f"{number}: {seconds:.2f} s" for seconds, number in sorted(slow)[-5:]))
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
