"""Every built-in method passes the suite that users' methods are offered."""

from __future__ import annotations

from typing import ClassVar

from pytest_qlab.testing import MethodConformance


class TestRounding(MethodConformance):
    specs: ClassVar = ("rtn", "rtn:bits=2:group_size=32:symmetric:mse", "rtn:bits=8:group_size=-1")


class TestInputsRounded(MethodConformance):
    specs: ClassVar = ("dynamic", "static", "static:bits=3:activation_bits=4")


class TestFloat8(MethodConformance):
    specs: ClassVar = ("fp8", "fp8:activations=false")


class TestGptq(MethodConformance):
    specs: ClassVar = (
        "gptq",
        "gptq:bits=2:group_size=32:static_groups=false",
        "gptq:bits=3:symmetric",
    )


class TestAwq(MethodConformance):
    specs: ClassVar = ("awq", "awq:bits=3:group_size=32:symmetric")


class TestGgml(MethodConformance):
    specs: ClassVar = ("ggml:Q4_K", "ggml:Q2_K:imatrix", "ggml:Q8_0", "ggml:IQ4_XS", "ggml:MXFP4")


class TestIdentity(MethodConformance):
    specs: ClassVar = ("none",)
