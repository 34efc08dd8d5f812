"""What is told of a CPU."""

import pytest

from vitq_compiler import cpu


@pytest.mark.parametrize(
    ("machine", "flags", "told"),
    [
        ("x86_64", "fpu sse4_1 avx2 fma", "AVX2 without VNNI: int8 products run at half the rate"),
        ("x86_64", "avx2 avx512f avx512bw", "AVX-512 without VNNI: int8 products run at half the rate"),
        ("x86_64", "avx2 avx512bw avx512_vnni", "AVX-512 VNNI"),
        ("AMD64", "avx2 avx_vnni", "AVX-VNNI"),
        ("x86_64", "avx512_vnni amx_int8", "AMX"),
        ("aarch64", "fp asimd", "ARM without dot product"),
        ("aarch64", "fp asimd asimddp", "dot product"),
        ("arm64", "asimd asimddp i8mm", "i8mm"),
        ("riscv64", "", "riscv64"),
    ],
)
def test_flags_become_words(machine: str, flags: str, told: str) -> None:
    assert cpu.integer_unit(f"flags : {flags}\n", machine) == told


@pytest.mark.parametrize(("cut", "told"), [(True, "x86 without VNNI: "), (False, "x86 whose products do not saturate")])
def test_without_flags_the_runtime_is_asked(cut: bool, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "saturates_here", lambda: cut)
    assert cpu.integer_unit("", "AMD64").startswith(told)


def test_this_cpu_agrees_with_itself() -> None:
    told = cpu.integer_unit()
    assert ("without VNNI" in told and "ARM" not in told) == cpu.saturates_here()
