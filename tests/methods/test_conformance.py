"""Every built-in method passes the suite that users' methods are offered."""

from __future__ import annotations

from typing import ClassVar

from pytest_qlab.methods.registry import method_names
from pytest_qlab.testing import MethodConformance
from pytest_qlab.testing.conformance import methods_of


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


class TestHqq(MethodConformance):
    specs: ClassVar = ("hqq", "hqq:bits=2:group_size=32", "hqq:bits=3:group_size=-1")


class TestFixedTables(MethodConformance):
    specs: ClassVar = ("nf4", "nf4:double_quant", "fp4:block_size=128")


class TestMicroscaling(MethodConformance):
    specs: ClassVar = (
        "mxfp4",
        "mxfp4:scale=ceil",
        "mxfp4:scale=even",
        "nvfp4",
        "nvfp4:four_over_six",
        "mxfp4:scale=even:activations",
        "nvfp4:activations",
    )


class TestSqueezeLlm(MethodConformance):
    specs: ClassVar = ("squeezellm", "squeezellm:bits=3:dense_and_sparse", "squeezellm:bits=2")


class TestQuip(MethodConformance):
    specs: ClassVar = ("quip", "quip:transform=hadamard:bits=3", "quip:bits=2:greedy_passes=2")


class TestSpqr(MethodConformance):
    specs: ClassVar = ("spqr", "spqr:bits=2", "spqr:bits=4:desc_act=false:leave_one_out=false")


class TestComposed(MethodConformance):
    specs: ClassVar = ("smoothquant", "quarot+gptq", "quarot+rtn:bits=3", "smooth+gptq:bits=3")


def test_no_built_in_method_is_left_out() -> None:
    covered = {
        method.name
        for suite in MethodConformance.__subclasses__()
        if suite.__module__ == __name__
        for method in methods_of(suite)
    }
    finished = {"gguf", "gguf_file", "llamacpp"}  # Whole models, by the code of others or a mix.
    assert set(method_names()) - covered == finished


class TestLdlq(MethodConformance):
    specs: ClassVar = ("ldlq", "ldlq:nf4:desc_act=false", "ldlq:table3", "ldlq:mxfp4", "ldlq:fp8")
