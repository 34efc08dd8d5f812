"""The rules of TensorRT 8.6, 10 and 11: what it accepts (T) and what it runs fast (S)."""

from vitq_compiler.lint.tensorrt import attention, numbers, operators, placement, types, weights

RULES = tuple(
    sorted(
        (*numbers.RULES, *types.RULES, *operators.RULES, *weights.RULES, *placement.RULES, *attention.RULES),
        key=lambda rule: (rule.id[0] != "T", rule.id),
    )
)
