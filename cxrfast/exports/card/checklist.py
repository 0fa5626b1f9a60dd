"""Items of a reporting checklist that a model card can answer, and those that its author must.

Source: CLAIM (Mongan, Moy and Kahn 2020, Radiology: Artificial Intelligence 2(2):e200029), by its numbers.
"""

from collections.abc import Sequence

from cxrfast.exports.card.cohort import Cohort
from cxrfast.inference.ensemble import ScaleEnsemble
from cxrfast.runs.run import Run
from cxrfast.tables import Table

TO_FILL_IN = "**to be filled in by the author**"
"""Stands in a card where only the author knows."""

AUTHOR = "to be filled in by the author"


def checklist(run: Run, ensemble: ScaleEnsemble, formats: Sequence[str], cohort: Cohort) -> Table:
    """Number, item and answer."""
    parts = "patients" if not run.config.allow_shared_patients else "none: patients may be in two parts"
    combined = "stacked scales, mean over folds" if len(ensemble.members) > 1 else "none, one network"
    items = [
        (5, "Prospective or retrospective study", AUTHOR),
        (6, "Study goal", AUTHOR),
        (7, "Data sources", "Training data" if cohort.info else AUTHOR),
        (8, "Eligibility criteria; where and when data were collected", AUTHOR),
        (9, "Data preprocessing", "Preprocessing"),
        (10, "Selection of data subsets", "Training data; Training recipe (views, limit)"),
        (11, "Definitions of data elements", AUTHOR),
        (12, "De-identification", AUTHOR),
        (13, "Missing data", "Training data: policies for blank and uncertain labels"),
        (14, "Definition of the reference standard", AUTHOR),
        (15, "Rationale for the reference standard", AUTHOR),
        (16, "Source of annotations; qualifications of annotators", AUTHOR),
        (17, "Annotation tools", AUTHOR),
        (18, "Variability of annotators", AUTHOR),
        (19, "Intended sample size and how it was found", AUTHOR),
        (20, "How data were assigned to partitions", "Training data: split, counts"),
        (21, "Level at which partitions are disjoint", parts),
        (22, "Model: inputs, outputs, layers", "Model details; Preprocessing"),
        (23, "Software libraries and versions", "Versions"),
        (24, "Initialisation of parameters", "Model details: first weights"),
        (25, "Training: augmentation, hyperparameters", "Training recipe"),
        (26, "How the final model was selected", "lowest validation loss"),
        (27, "Ensembling", combined),
        (28, "Metrics of performance", "Evaluation"),
        (29, "Statistical significance and uncertainty", "standard deviation over folds only; intervals not computed"),
        (30, "Robustness or sensitivity analysis", AUTHOR),
        (31, "Explainability", "Grad-CAM and receptive fields can be computed; " + AUTHOR),
        (32, "Validation on external data", "Evaluation: external validation"),
        (33, "Flow of participants", AUTHOR),
        (34, "Demographic and clinical characteristics by partition", AUTHOR),
        (35, "Performance on all partitions", "Evaluation: test rows; validation at the thresholds"),
        (36, "Diagnostic accuracy and its precision", "Evaluation: thresholds; precision not computed"),
        (37, "Failure analysis", AUTHOR),
        (40, "Registration number", AUTHOR),
        (41, "Access to the protocol", AUTHOR),
        (42, "Funding", AUTHOR),
    ]
    return Table(
        "",
        ["CLAIM", "Item", "Where, or what"],
        [[str(number), item, answer] for number, item, answer in items],
        text=["Item", "Where, or what"],
    )
