package rootfs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// maxUserFile bounds /etc/passwd and /etc/group of an image.
const maxUserFile = 1 << 20

// User resolves an image's user ("", "name", "uid", "name:group", "uid:gid")
// with the image's own files. ids bounds the answer.
func User(user, dir string, ids int) (uid, gid int, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, 0, fmt.Errorf("opening image folder: %w", err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	name, group, hasGroup := strings.Cut(user, ":")
	if name != "" {
		if uid, gid, err = lookup(root, "etc/passwd", name); err != nil {
			return 0, 0, unknownUser(user, err)
		}
	}
	if hasGroup && group != "" {
		if gid, _, err = lookup(root, "etc/group", group); err != nil {
			return 0, 0, unknownUser(user, err)
		}
	}
	if uid < 0 || gid < 0 || uid >= ids || gid >= ids {
		return 0, 0, unknownUser(user, fmt.Errorf("ids are not below %d", ids))
	}
	return uid, gid, nil
}

func unknownUser(user string, err error) error {
	return contract.Refuse("guest.image-user", "name a numeric user in the image", "the image's user %.100q is unknown", user).Because(err)
}

// lookup finds name in a colon-separated file and returns its third field,
// and the fourth when it is a number. A number stands for itself, with group
// 0 unless the file knows better (OCI image spec 1.1, config.md, "User").
func lookup(root *os.Root, file, name string) (id, group int, err error) {
	number, numErr := strconv.Atoi(name)
	f, err := root.Open(file)
	if errors.Is(err, fs.ErrNotExist) && numErr == nil {
		return number, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	defer f.Close() //nolint:errcheck // only read from
	lines := bufio.NewScanner(io.LimitReader(f, maxUserFile))
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) < 4 || (fields[0] != name && (numErr != nil || fields[2] != name)) {
			continue
		}
		if id, err = strconv.Atoi(fields[2]); err != nil {
			return 0, 0, fmt.Errorf("reading %s: %w", file, err)
		}
		if group, err = strconv.Atoi(fields[3]); err != nil {
			group = 0 // /etc/group has members there
		}
		return id, group, nil
	}
	if err := lines.Err(); err != nil {
		return 0, 0, fmt.Errorf("reading %s: %w", file, err)
	}
	if numErr == nil {
		return number, 0, nil
	}
	return 0, 0, fmt.Errorf("%s does not know %q", file, name)
}
