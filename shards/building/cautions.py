"""What to know about the rows of a set before training on them: shared patients, a split without a part, blank labels."""

import pandas as pd

from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.sources.parts import SPLITS
from cxrfast.splits import shared_patients


def cautions(info: SetInfo, rows: pd.DataFrame) -> list[str]:
    """Sentences for the report of a build and for `describe`; they name images by row. [] if there is nothing to say."""
    patients = rows["patient_id"].tolist()
    found = [
        f"{what}: {shared.in_words(lambda row: f'row {row}')}; `cxrfast train` refuses it without --allow-shared-patients"
        for what, parts in (("official split", rows["split"]), ("folds", "fold " + rows["fold"].astype(str)))
        if (what != "folds" or info.own_folds)  # the set's own are dealt by patient
        and (shared := shared_patients(patients, parts.tolist()))
    ]
    lacking = [part for part in SPLITS if not rows["split"].eq(part).any()]
    if info.source_options.get("split_column") and not info.own_folds and lacking:
        found.append(
            f"official split: no image is in {' or '.join(lacking)}; `cxrfast train` needs {', '.join(SPLITS)}, or --split folds"
        )
    if blank := [name for name in info.labels if rows[name].isna().all()]:
        found.append(
            f"blank for every image: {', '.join(blank)}; such a label is trained as negative everywhere, unless "
            "`cxrfast train --blank LABEL=ignore` leaves it out of the loss"
        )
    return found
