package rootfs

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

func FuzzUser(f *testing.F) {
	f.Add("app:staff", []byte("root:x:0:0:::\napp:x:7:8:::\n"), []byte("staff:x:9:app\n"))
	f.Add("12345678901234567890", []byte(""), []byte(""))
	f.Add("-1:-1", []byte(":::"), []byte("a:b:c:d"))
	f.Fuzz(func(t *testing.T, user string, passwd, group []byte) {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, data := range map[string][]byte{"passwd": passwd, "group": group} {
			if err := os.WriteFile(filepath.Join(dir, "etc", name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		const ids = 1000
		if uid, gid, err := User(user, dir, ids); err == nil && (uid < 0 || gid < 0 || uid >= ids || gid >= ids) {
			t.Errorf("user %q is %d:%d", user, uid, gid)
		}
	})
}

func FuzzConfiguration(f *testing.F) {
	f.Add([]byte(`{"Entrypoint":["a"],"Cmd":["b"],"Env":["A=b"],"WorkingDir":"/x","User":"1"}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var cfg v1.Config
		if json.Unmarshal(text, &cfg) != nil {
			return
		}
		img, err := mutate.Config(empty.Image, cfg)
		if err != nil {
			return
		}
		if p, err := Configuration(img, nil); err == nil && (len(p.Args) == 0 || p.Dir == "") {
			t.Errorf("%+v", p)
		}
	})
}
