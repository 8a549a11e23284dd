"""Exit 0 when this container's process answers on its health port, else 1."""

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    """Ask `/v2/health/live` on loopback."""
    url = f"http://127.0.0.1:{os.environ.get('EXFM_HEALTH__PORT', '9100')}/v2/health/live"
    try:
        with urllib.request.urlopen(url, timeout=3) as answer:
            return 0 if answer.status == 200 else 1
    except (OSError, urllib.error.URLError) as error:
        sys.stderr.write(f"{url}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
