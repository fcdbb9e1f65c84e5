"""Record what dense runs reached, for the last lines of low-rank runs at their settings:
``python docs/scripts/record_dense.py RUN ...``. It replaces all records.
"""

import json
import sys

from inrank_megatron.reporting.recorded import RECORDS, dense_settings, unigram_perplexity
from inrank_megatron.reporting.run import read_run

if __name__ == "__main__":
    records = []
    for folder in sys.argv[1:]:
        run = read_run(folder)
        evaluations = {split: run.last_evaluation(split) for split in ("valid", "test")}
        if run.ranks or not run.summary.get("finished") or None in evaluations.values():
            sys.exit(f"error: {folder} is no finished dense run with validation and test text")
        records.append(
            {
                "settings": dense_settings(run),
                "unigram_perplexity": unigram_perplexity(run),
                "perplexity": {split: record["perplexity"] for split, record in evaluations.items()},
            }
        )
    RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
