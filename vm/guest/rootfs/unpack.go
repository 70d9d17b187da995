package rootfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// Limits of an image, far above what images have.
const (
	maxLayers  = 256
	maxEntries = 1 << 20
	maxPath    = 4096
	maxTrailer = 16 << 20 // tar pads to blocks, some builders to more
	maxLinks   = 40       // symbolic links followed in one path, as the kernel does
	maxDepth   = 256      // folders in one path
	maxSteps   = 4096     // looked at to find one folder
	// entryCost is charged for each entry beside its names: about what an
	// empty file takes of a file system in memory.
	entryCost = 1 << 10
)

// Markers of deleted files (OCI image spec 1.1, layer.md, "Whiteouts").
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// errMalformed means that a layer is no file system this guest unpacks.
var errMalformed = errors.New("malformed layer")

// Unpacker writes layers into a folder.
type Unpacker struct {
	// Shift is added to every owner: the workload's user namespace starts
	// there.
	Shift int
	// IDs bounds owners before the shift.
	IDs int
	// MaxBytes bounds the files' sizes together, with a fixed share for each
	// entry.
	MaxBytes int64

	root    *os.Root
	entries int
	bytes   int64
	// stream is what may still be unpacked, skipped content included.
	stream int64
	// written are the paths of the layer at hand and above are the folders
	// they lie in: its own whiteouts do not hide them.
	written, above map[string]bool
	// folders are paths known to be folders, and so are those they lie in:
	// looking at each of a deep path for every entry costs its square.
	folders map[string]bool
}

// Unpack flattens an image into an empty folder.
func (u *Unpacker) Unpack(ctx context.Context, img v1.Image, dir string) (err error) {
	layers, err := img.Layers()
	if err != nil {
		return pullError(err)
	}
	if len(layers) > maxLayers {
		return contract.Refuse("guest.image-malformed", "rebuild the image with fewer layers", "the image has %d layers, more than %d", len(layers), maxLayers)
	}
	u.stream, u.folders = 2*u.MaxBytes+maxTrailer, map[string]bool{}
	if u.root, err = os.OpenRoot(dir); err != nil {
		return fmt.Errorf("opening image folder: %w", err)
	}
	defer func() { err = errors.Join(err, u.root.Close()) }()
	for i, layer := range layers {
		if err := u.layer(ctx, layer); err != nil {
			return classify(fmt.Errorf("unpacking layer %d: %w", i, err))
		}
	}
	return nil
}

// classify tells a registry at fault from an image at fault, and from a guest
// that is too small.
func classify(err error) error {
	_, refused := errors.AsType[*contract.Refusal](err)
	_, registry := errors.AsType[*sourceError](err)
	switch {
	case refused, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case registry, isMismatch(err):
		return pullError(err)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EDQUOT):
		return contract.Refuse("guest.out-of-memory", "give the guest more memory", "the image does not fit the guest's memory").Because(err)
	}
	return contract.Refuse("guest.image-malformed", "rebuild the image", "the image has a layer this guest does not unpack").Because(err)
}

func isMismatch(err error) bool {
	// The library has no type for it: internal/verify says "error verifying".
	return slices.ContainsFunc([]string{"error verifying", "does not match requested digest", "does not match expected size"},
		func(s string) bool { return strings.Contains(err.Error(), s) })
}

func (u *Unpacker) layer(ctx context.Context, layer v1.Layer) (err error) {
	compressed, err := layer.Compressed()
	if err != nil {
		return &sourceError{err}
	}
	defer func() { err = errors.Join(err, compressed.Close()) }()
	unpacked, done, err := decompress(compressed)
	if err != nil {
		return err
	}
	defer done()
	stream := bounded{unpacked, &u.stream}
	u.written, u.above = map[string]bool{}, map[string]bool{}
	archive := tar.NewReader(stream)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := u.entry(h, archive); err != nil {
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
	}
	// The digest is compared at the end of the compressed stream, which lies
	// beyond the end of the archive.
	n, err := io.Copy(io.Discard, io.LimitReader(stream, maxTrailer))
	if err == nil && n == maxTrailer {
		err = fmt.Errorf("%w: more than %d bytes after the archive", errMalformed, maxTrailer)
	}
	return err
}

func (u *Unpacker) entry(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return u.charge("")
	}
	if err := u.charge(h.Name + h.Linkname); err != nil {
		return err
	}
	name := path.Clean("/" + h.Name)[1:]
	if len(h.Name) > maxPath || strings.Count(name, "/") >= maxDepth {
		return fmt.Errorf("%w: too long or too deep a name", errMalformed)
	}
	if name == "" {
		return nil // the root itself
	}
	parent, err := u.resolve(path.Dir(name))
	if err != nil {
		return err
	}
	base := path.Base(name)
	if base == whiteoutOpaque {
		return u.hideBelow(parent)
	}
	if victim, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		if victim == "" || victim == "." || victim == ".." {
			return fmt.Errorf("%w: whiteout of nothing", errMalformed)
		}
		return u.hide(path.Join(parent, victim))
	}
	if err := u.makeFolders(parent); err != nil {
		return err
	}
	name = path.Join(parent, base)
	if err := u.create(name, h, content); err != nil {
		return err
	}
	u.written[name] = true
	for dir := parent; dir != "." && !u.above[dir]; dir = path.Dir(dir) {
		u.above[dir] = true
	}
	return nil
}

// charge counts what one more entry costs.
func (u *Unpacker) charge(names string) error {
	if u.entries++; u.entries > maxEntries {
		return fmt.Errorf("%w: more than %d entries", errMalformed, maxEntries)
	}
	return u.spend(entryCost + int64(len(names)))
}

func (u *Unpacker) spend(n int64) error {
	if n < 0 || n > u.MaxBytes-u.bytes {
		return fmt.Errorf("image is larger than %d bytes: %w", u.MaxBytes, unix.ENOSPC)
	}
	u.bytes += n
	return nil
}

// makeFolders makes the folders that the archive does not name itself.
func (u *Unpacker) makeFolders(dir string) error {
	for d := dir; d != "." && !u.folders[d]; d = path.Dir(d) {
		_, err := u.root.Lstat(d)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := u.charge(d); err != nil {
			return err
		}
	}
	if u.folders[dir] {
		return nil
	}
	return u.root.MkdirAll(dir, 0o755)
}

// remove removes a name and all below it.
func (u *Unpacker) remove(name string) error {
	if u.folders[name] {
		clear(u.folders)
	}
	return u.root.RemoveAll(name)
}

// resolve follows symbolic links in a folder's path, absolute ones from the
// image's own root. What does not exist is taken as it is.
func (u *Unpacker) resolve(dir string) (string, error) {
	todo := strings.Split(path.Clean(dir), "/")
	done := "."
	steps := 0
	for links := 0; len(todo) > 0; {
		if steps++; steps > maxSteps || strings.Count(done, "/") >= maxDepth {
			return "", fmt.Errorf("%w: too long or too deep a path", errMalformed)
		}
		part := todo[0]
		todo = todo[1:]
		if part == "" || part == "." {
			continue
		}
		if part == ".." {
			if done = path.Dir(done); done == "/" {
				done = "."
			}
			continue
		}
		next := path.Join(done, part)
		if u.folders[next] {
			done = next
			continue
		}
		info, err := u.root.Lstat(next)
		if errors.Is(err, fs.ErrNotExist) || (err == nil && info.Mode()&fs.ModeSymlink == 0) {
			if err == nil && info.IsDir() {
				u.folders[next] = true
			}
			done = next
			continue
		}
		if err != nil {
			return "", err
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("%w: too many symbolic links", errMalformed)
		}
		target, err := u.root.Readlink(next)
		if err != nil {
			return "", err
		}
		if path.IsAbs(target) {
			done = "."
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return done, nil
}

// hide removes what lower layers left under a name. What the layer at hand
// wrote stays, wherever the marker stands in it (OCI image spec 1.1).
func (u *Unpacker) hide(name string) error {
	if !u.written[name] && !u.above[name] {
		return u.remove(name)
	}
	info, err := u.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // written and replaced since
	}
	if err != nil || !info.IsDir() {
		return err
	}
	return u.hideBelow(name)
}

// hideBelow removes what lower layers put into a folder.
func (u *Unpacker) hideBelow(dir string) error {
	f, err := u.root.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	names, err := f.Readdirnames(-1)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	for _, n := range names {
		if err := u.hide(path.Join(dir, n)); err != nil {
			return err
		}
	}
	return nil
}

func (u *Unpacker) create(name string, h *tar.Header, content io.Reader) error {
	uid, gid, err := u.owner(h)
	if err != nil {
		return err
	}
	// Set-id bits mean nothing to a workload that cannot gain privileges.
	mode := fs.FileMode(h.Mode) & fs.ModePerm
	if h.Mode&unix.S_ISVTX != 0 {
		mode |= fs.ModeSticky
	}
	if err := u.clear(name, h.Typeflag == tar.TypeDir); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		if err := u.root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	case tar.TypeReg:
		if err := u.file(name, h.Size, content); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if len(h.Linkname) == 0 || len(h.Linkname) > maxPath {
			return fmt.Errorf("%w: symbolic link to nothing", errMalformed)
		}
		if err := u.root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		return u.root.Lchown(name, uid, gid)
	case tar.TypeLink:
		return u.link(name, h.Linkname)
	default:
		// Devices, sockets and pipes: the workload's /dev is made by the init,
		// and no image needs others.
		if strings.HasPrefix(name, "dev/") {
			return nil
		}
		return fmt.Errorf("%w: entry of type %q", errMalformed, h.Typeflag)
	}
	if err := u.root.Chown(name, uid, gid); err != nil {
		return err
	}
	return u.root.Chmod(name, mode)
}

func (u *Unpacker) owner(h *tar.Header) (int, int, error) {
	if h.Uid < 0 || h.Gid < 0 || h.Uid >= u.IDs || h.Gid >= u.IDs {
		return 0, 0, fmt.Errorf("%w: owner %d:%d is not below %d", errMalformed, h.Uid, h.Gid, u.IDs)
	}
	return h.Uid + u.Shift, h.Gid + u.Shift, nil
}

// clear makes way for an entry of a higher layer. A folder over a folder
// keeps what is in it.
func (u *Unpacker) clear(name string, isDir bool) error {
	info, err := u.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if isDir && info.IsDir() {
		return nil
	}
	return u.remove(name)
}

func (u *Unpacker) file(name string, size int64, content io.Reader) (err error) {
	if err := u.spend(size); err != nil {
		return err
	}
	f, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = io.Copy(f, content)
	return err
}

// link makes a hard link. Owner and mode are the target's.
func (u *Unpacker) link(name, target string) error {
	clean := path.Clean("/" + target)[1:]
	if clean == "" || len(target) > maxPath {
		return fmt.Errorf("%w: hard link to the root, or to too long a name", errMalformed)
	}
	parent, err := u.resolve(path.Dir(clean))
	if err != nil {
		return err
	}
	old := path.Join(parent, path.Base(clean))
	if info, err := u.root.Lstat(old); err != nil || info.IsDir() {
		return fmt.Errorf("%w: hard link to what is no file", errMalformed)
	}
	return u.root.Link(old, name)
}
