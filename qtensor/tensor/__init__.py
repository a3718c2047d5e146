"""QTensor, the quantized weight, `quantize`, and the operations it answers."""
