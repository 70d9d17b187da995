// Package gpu is what a guest does about the GPUs its manifest asks for. It
// counts them three ways, has a helper gather their evidence, and lets them
// take work only after that evidence was accepted. Whatever differs ends the
// guest.
//
// The init is a static program and cannot load NVIDIA's library (NVML); the
// helper can. It is measured with the image, runs from the start of the GPUs
// to the guest's end, so that the driver never loses its session with them,
// and is spoken to over two pipes, one JSON object a line. It is trusted as
// the driver below it is: it cannot make a GPU's signature, only withhold it.
//
// set.go is the order of things; sysfs.go what the kernel shows; wire.go the
// helper's language; serve.go its other end.
package gpu
