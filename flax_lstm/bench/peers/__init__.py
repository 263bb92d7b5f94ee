"""Everyone's LSTM behind one door: ours, and those of other libraries.

Each library is imported when its implementation is looked at, so that none has to be
there. Each gets inputs in the layout it likes best, on the device, in the dtype of the
case, and lengths the way its users hand them over.
"""
