"""Measuring attention: named shapes, inputs, the cases that run them, their time, memory and error."""
