// One LSTM layer on the CPU, forward and backward in time, for XLA's foreign function
// interface. float32, gate order i f g o, time-major arrays (see flax_lstm.cell).
//
// For s = 0 .. length-1:  z = x_t W + h R + b;  i, f, o = sigmoid;  g = tanh;
//                         c = f c + i g;  h = o tanh(c)      (t = s, or length-1-s)
//
// Panels   Weights are packed once per call into panels [K][WIDTH]: in the forward pass
//          one panel holds the four gates of LANES units, so that a register tile ends
//          with all it needs for c and h.
// Tile     ROWS rows by 4 vectors, in registers (products.h). Every product, forward,
//          backward and of the weights' gradient, is this one; but where there are too
//          few rows to pay for packing, the weights are read as they lie.
// Rows     are visited by falling length and only while they are alive: the padding of
//          a batch is neither read nor computed. A reset reads a row of zeros as h, c.
// Threads  split the rows when there are many (no waiting for one another), else the
//          panels of each step, each thread staying with its own, in its own cache.
// Order    Every sum of the forward pass runs over the bias, the inputs and h in that
//          order, whatever the batch, the threads or the pieces of time: same bits.
#include "backward.h"
#include "forward.h"

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FlaxLstmForward, forward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::U8>>()
        .Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>()
        .Attr<bool>("reverse"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FlaxLstmBackward, backward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::U8>>()
        .Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>()
        .Attr<bool>("reverse"));
