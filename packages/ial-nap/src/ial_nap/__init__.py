"""Interactive attention learning: verdicts on what a time-series model attends to, obeyed without a gradient step.

After Heo et al., "Cost-effective Interactive Attention Learning with Neural Attention Processes", ICML 2020.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from ial_nap.annotations import Annotation as Annotation
    from ial_nap.annotations import read_jsonl as read_jsonl
    from ial_nap.attention import Contributions as Contributions
    from ial_nap.attention import Retain as Retain
    from ial_nap.attention import Uncertain as Uncertain
    from ial_nap.context import Context as Context
    from ial_nap.context import Shift as Shift
    from ial_nap.data import load_data as load_data
    from ial_nap.dataset import Dataset as Dataset
    from ial_nap.dataset import Split as Split
    from ial_nap.dataset import plant as plant
    from ial_nap.episodes import Episodes as Episodes
    from ial_nap.estimator import Annotations as Annotations
    from ial_nap.estimator import Attention as Attention
    from ial_nap.estimator import NAPClassifier as NAPClassifier
    from ial_nap.estimator import NAPRegressor as NAPRegressor
    from ial_nap.estimator import ScoreReport as ScoreReport
    from ial_nap.gated import GatedModel as GatedModel
    from ial_nap.gated import wrap as wrap
    from ial_nap.influence import HeadInfluence as HeadInfluence
    from ial_nap.influence import Influence as Influence
    from ial_nap.influence import ModelInfluence as ModelInfluence
    from ial_nap.influence import influence_on as influence_on
    from ial_nap.metrics import measure as measure
    from ial_nap.nap import ContextEncoder as ContextEncoder
    from ial_nap.nap import FeatureNAP as FeatureNAP
    from ial_nap.nap import Predicted as Predicted
    from ial_nap.ranking import CER as CER
    from ial_nap.ranking import Ranked as Ranked
    from ial_nap.ranking import counterfactual as counterfactual
    from ial_nap.release import ReleaseNAP as ReleaseNAP
    from ial_nap.reports import Certificate as Certificate
    from ial_nap.reports import Faithfulness as Faithfulness
    from ial_nap.reports import Moved as Moved
    from ial_nap.reports import Stability as Stability
    from ial_nap.reports import Worth as Worth
    from ial_nap.reports import certificate as certificate
    from ial_nap.reports import certify as certify
    from ial_nap.reports import faithfulness as faithfulness
    from ial_nap.reports import stability as stability
    from ial_nap.reports import tax as tax
    from ial_nap.reports import value_of_information as value_of_information
    from ial_nap.reports import who_moved as who_moved
    from ial_nap.resampling import Difference as Difference
    from ial_nap.resampling import compare as compare
    from ial_nap.saving import load as load
    from ial_nap.series import Scaling as Scaling
    from ial_nap.series import Series as Series
    from ial_nap.series import make_series as make_series
    from ial_nap.simulation import Method as Method
    from ial_nap.simulation import Oracle as Oracle
    from ial_nap.simulation import Round as Round
    from ial_nap.simulation import Setting as Setting
    from ial_nap.simulation import simulate as simulate
    from ial_nap.store import AnnotationStore as AnnotationStore
    from ial_nap.toys import shift_mask as shift_mask
    from ial_nap.toys import shift_task as shift_task
    from ial_nap.training import Episodic as Episodic
    from ial_nap.training import Plain as Plain
    from ial_nap.training import Training as Training
    from ial_nap.training import finetune as finetune
    from ial_nap.web.model import ModelWorkbench as ModelWorkbench
    from ial_nap.web.model import serve as serve

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "annotations": ["Annotation", "read_jsonl"],
        "attention": ["Contributions", "Retain", "Uncertain"],
        "context": ["Context", "Shift"],
        "data": ["load_data"],
        "dataset": ["Dataset", "Split", "plant"],
        "episodes": ["Episodes"],
        "estimator": ["Annotations", "Attention", "NAPClassifier", "NAPRegressor", "ScoreReport"],
        "gated": ["GatedModel", "wrap"],
        "influence": ["HeadInfluence", "Influence", "ModelInfluence", "influence_on"],
        "metrics": ["measure"],
        "resampling": ["Difference", "compare"],
        "nap": ["ContextEncoder", "FeatureNAP", "Predicted"],
        "ranking": ["CER", "Ranked", "counterfactual"],
        "release": ["ReleaseNAP"],
        "reports": [
            "Certificate",
            "Faithfulness",
            "Moved",
            "Stability",
            "Worth",
            "certificate",
            "certify",
            "faithfulness",
            "stability",
            "tax",
            "value_of_information",
            "who_moved",
        ],
        "saving": ["load"],
        "series": ["Scaling", "Series", "make_series"],
        "simulation": ["Method", "Oracle", "Round", "Setting", "simulate"],
        "store": ["AnnotationStore"],
        "toys": ["shift_mask", "shift_task"],
        "training": ["Episodic", "Plain", "Training", "finetune"],
        "web.model": ["ModelWorkbench", "serve"],
    },
)
