"""What the ``onnx`` extra brings, asked for only when it is used."""

from __future__ import annotations

from importlib import import_module

NEEDED_TO_EXPORT = ("onnx", "onnxscript")


class OnnxError(ValueError):
    """A simulation that cannot be written as ONNX, or a file that does not fit it: the message names the edge or the file."""


def need(*names: str) -> None:
    """See that these modules can be imported.

    Raises:
        ImportError: one is not installed; the message names the extra.
    """
    try:
        for name in names:
            import_module(name)
    except ImportError as error:
        raise ImportError(f"{' and '.join(names)} are needed for ONNX files ({error}); pip install 'quantsim[onnx]' brings them") from error
