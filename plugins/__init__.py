"""The operator `stca::TargetHistoryAttention`, defined once, in every form a deployment needs.

`spec` names it and checks its arguments, `reference` is the float64 truth, `onnx_function` its body in standard ONNX
operators, `torch_op` the `torch.ops.stca.target_history_attention` that `torch.export` sees as one node.
"""
