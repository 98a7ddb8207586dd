"""A record with every part, for the tests of the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def record(query: str = "audio", key: str = "video") -> dict[str, Any]:
    """Return a record of six steps, two dataloaders and two samples; the words are those of the caller."""
    maps = [[[0.5, -1.0, None], [0.25, i, 1.5]] for i in (0.0, 0.5)]
    own = [[[i, 0.75], [-0.5, 0.125]] for i in (0.0, 0.5)]
    pair = {"query": query, "key": key, "attention": f"fusion.{query}", "queries": 2, "keys": 3}
    figures: dict[str, list[float | None]] = {
        "loss": [1.0, 0.5, None, 0.25, 0.2, 0.1],
        "entropy": [1.5, 1.2, None, 1.0, 0.9, 0.8],
        "source_entropy": [1.5, 1.6, 1.4, 1.5, 1.5, 1.5],
        "flip_rate": [0.0, 0.25, 0.5, 0.25, 0.0, 0.25],
        "class_share": [1.4, 1.3, 1.2, 1.0, 0.8, 0.5],
        "information": [0.4, 0.3, 0.2, 0.1, 0.1, 0.0],
        f"attention_gap/{query}_to_{key}": [0.5, 0.4, None, 0.2, 0.1, 0.1],
        f"divergence/{query}_to_{key}": [1.5, 1.4, None, 1.2, 1.1, 1.1],
        "updated": [1.0, 1.0, 0.0, 1.0, 1.0, 1.0],
    }
    means = {"entropy": 1.2, f"attention_gap/{query}_to_{key}": 0.3, "loss": None}
    return {
        "format": "lightning_abpem report",
        "version": 2,
        "run": {
            "method": "ABPEM",
            "stage": "test",
            "status": "failed",
            "error": f"ValueError: {query}",
            "finished": "2026-01-02T03:04:05+00:00",
            "processes": 2,
            "sync": "global",
        },
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "options": {"fusion": repr([query]), "modalities": repr({query: 2, key: 3})},
        "counts": {"steps": 6, "resets": 1, "updates": 5, "skipped": 1, "left_out": 2},
        "skipped": {f"not finite in {query}": 1},
        "steps": {"every": 1, "first": [0, 1, 2, 3, 4, 5], "samples": [4] * 6, "figures": figures},
        "classes": {"first": [0, 2, 4], "names": [0, 3], "counts": [[3, 1, 0], [5, 7, 8], [0, 0, 0]], "used": 2},
        "events": [{"step": 4, "action": "rollback", "cause": f"the entropy of {query}"}],
        "resets": [3],
        "dataloaders": [{"index": i, "first": 3 * i, "samples": 12, "figures": means} for i in range(2)],
        "seconds": {"total": 12.5, "adapting": 5.0},
        "blocks": {
            "pairs": [
                {**pair, "before": maps, "after": maps},
                {**pair, "key": query, "keys": 2, "before": own, "after": own},
            ]
        },
        "no_blocks": "",
        "metrics": {"accuracy/dataloader_idx_0": 0.5, "accuracy/dataloader_idx_1": 0.25, f"{query}-recall": None},
    }


def written(folder: Path, content: dict[str, Any]) -> Path:
    """Write a record to a file; return it."""
    path = folder / "report.json"
    path.write_text(json.dumps(content))
    return path
