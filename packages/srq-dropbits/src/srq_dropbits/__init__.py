"""2- to 8-bit networks with learned grids and learned bit-widths per layer, exported for real.

Lee, Yun, Hwang and Yang, "Semi-Relaxed Quantization with DropBits", arXiv:1911.12990, and "Cluster-Promoting
Quantization with Bit-Drop", arXiv:2109.02100 (ICCV 2021), on Louizos et al., "Relaxed Quantization for
Discretized Neural Networks", arXiv:1810.01875. ``prepare(model, QuantConfig(...))`` makes any model quantized;
training is the user's own; ``convert``, ``save_packed`` and ``export_onnx`` give what is deployed.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from srq_dropbits.bits import Report as Report
    from srq_dropbits.bits import bit_penalty as bit_penalty
    from srq_dropbits.bits import freeze_bits as freeze_bits
    from srq_dropbits.bits import report as report
    from srq_dropbits.bits import truncate as truncate
    from srq_dropbits.bits import update_controller as update_controller
    from srq_dropbits.config import DropBits as DropBits
    from srq_dropbits.config import LearnBits as LearnBits
    from srq_dropbits.config import QuantConfig as QuantConfig
    from srq_dropbits.deploy import convert as convert
    from srq_dropbits.deploy import size_table as size_table
    from srq_dropbits.functional import concrete_quantize as concrete_quantize
    from srq_dropbits.functional import log_probs as log_probs
    from srq_dropbits.functional import lsq_quantize as lsq_quantize
    from srq_dropbits.functional import mode_quantize as mode_quantize
    from srq_dropbits.gates import hard_concrete as hard_concrete
    from srq_dropbits.gates import masked_quantize as masked_quantize
    from srq_dropbits.grid import Grid as Grid
    from srq_dropbits.layers import ResidualAdd as ResidualAdd
    from srq_dropbits.onnx_export import export_onnx as export_onnx
    from srq_dropbits.packing import inspect_packed as inspect_packed
    from srq_dropbits.packing import load_packed as load_packed
    from srq_dropbits.packing import pack_bits as pack_bits
    from srq_dropbits.packing import save_packed as save_packed
    from srq_dropbits.packing import unpack_bits as unpack_bits
    from srq_dropbits.qat import calibrate as calibrate
    from srq_dropbits.qat import param_groups as param_groups
    from srq_dropbits.qat import prepare as prepare
    from srq_dropbits.qat import reestimate_bn as reestimate_bn
    from srq_dropbits.qat import resample as resample
    from srq_dropbits.qat import set_dropbits as set_dropbits
    from srq_dropbits.saving import load as load
    from srq_dropbits.saving import save as save
    from srq_dropbits.sklearn import QuantizedMLPClassifier as QuantizedMLPClassifier
    from srq_dropbits.training import quantize_and_train as quantize_and_train

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "bits": ["Report", "bit_penalty", "freeze_bits", "report", "truncate", "update_controller"],
        "config": ["DropBits", "LearnBits", "QuantConfig"],
        "deploy": ["convert", "size_table"],
        "functional": ["concrete_quantize", "log_probs", "lsq_quantize", "mode_quantize"],
        "gates": ["hard_concrete", "masked_quantize"],
        "grid": ["Grid"],
        "layers": ["ResidualAdd"],
        "onnx_export": ["export_onnx"],
        "packing": ["inspect_packed", "load_packed", "pack_bits", "save_packed", "unpack_bits"],
        "qat": ["calibrate", "param_groups", "prepare", "reestimate_bn", "resample", "set_dropbits"],
        "saving": ["load", "save"],
        "sklearn": ["QuantizedMLPClassifier"],
        "training": ["quantize_and_train"],
    },
)
