"""From a torch module to ONNX and OpenVINO IR, with proof that all three compute the same."""
