"""Checkpoint → torch module → one ONNX request graph → split by dataflow → bundle."""
