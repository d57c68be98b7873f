"""Attacks on files: what lies outside is read, written or mounted, directly and through links. See `sandbox_attacks_reach`."""

# ruff: noqa: E501

FILES = r"""
## files/read
#: path=@canary@|@home_canary@|@repository@/pyproject.toml|/etc/passwd|/etc/shadow|/etc/hostname|/root/.bashrc|/root/.ssh/id_rsa|/var/log/dpkg.log|/proc/version|/sys/kernel/version|/run/utmp|/boot|/etc/resolv.conf|/usr/share/doc|/usr/bin/env|/usr/local/bin|/dev/kmsg|/dev/mem|/dev/sda|/dev/vda|/dev/tty|/dev/ptmx|/dev/shm|/dev/fuse|/dev/kvm
#: how=open|os|fileio|path|mmap|list|walk|codecs|linecache|loader|libc|sqlite|copy|stat|archive
import os, io, sys
path, how = '@path@', '@how@'
def strangers(folder): return [n for n in os.listdir(folder) if n not in os.__file__.split('/') + 'usr lib lib64 dev tmp null zero urandom'.split()] or 1 / 0
def read():
    if how == 'open': return open(path, 'rb').read(500)
    if how == 'os': return os.read(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 500)
    if how == 'fileio': return io.FileIO(path).read(500)
    if how == 'path':
        import pathlib; return pathlib.Path(path).read_bytes()[:500]
    if how == 'mmap':
        import mmap; return mmap.mmap(os.open(path, os.O_RDONLY), 100, prot=mmap.PROT_READ)[:]
    if how == 'list': return strangers(path)
    if how == 'walk': return strangers(os.path.dirname(path))
    if how == 'codecs':
        import codecs; return codecs.open(path, encoding='latin-1').read(500)
    if how == 'linecache':
        import linecache; return linecache.getlines(path)[0]
    if how == 'loader':
        import importlib.machinery as m; return m.SourceFileLoader('x', path).get_data(path)[:500]
    if how == 'libc':
        import ctypes; libc = ctypes.CDLL(None, use_errno=True); fd = libc.open(path.encode(), 0)
        assert fd >= 0, ctypes.get_errno(); return os.read(fd, 500)
    if how == 'sqlite':
        import sqlite3; return sqlite3.connect(f'file:{path}?mode=ro', uri=True).execute('select 1 from sqlite_master').fetchall()
    if how == 'copy':
        import shutil; shutil.copyfile(path, 'copied'); return open('copied', 'rb').read(500)
    if how == 'stat': return os.stat(path)
    import tarfile
    with tarfile.open('a.tar', 'w') as t: t.add(path)
    return tarfile.open('a.tar').getnames()
print('REACHED', read())

## files/dots
#: depth=1|3|8|40
#: rest=@canary@|/etc/passwd|/root
import os
path = '../' * @depth@ + '@rest@'
own = os.__file__.split('/') + 'usr lib lib64 dev tmp'.split()
print('REACHED', [n for n in os.listdir(path) if n not in own] or 1 / 0 if os.path.isdir(path) else open(path).read(200))

## files/open_folders
import os
for fd in range(0, 256):
    for name in ('..', '../..', '@canary@'.lstrip('/'), '../../../../@canary@'):
        try:
            print('REACHED', os.read(os.open(name, os.O_RDONLY, dir_fd=fd), 100))
        except OSError:
            pass

## files/chroot_twice
import os
os.mkdir('x'); fd = os.open('/', os.O_RDONLY); os.chroot('x'); os.fchdir(fd)
for _ in range(50): os.chdir('..')
os.chroot('.'); print('REACHED', open('@canary@').read())

## files/write
#: path=/evil|/lib/evil|/usr/lib/evil|/dev/evil|/etc/cron.d/evil|/old/evil|@canary_folder@/evil|@canary@|@stdlib@/os.py|@stdlib@/evil.py|/dev/null/x
#: mode=a|w|r+b|xb
with open('@path@', '@mode@') as f:
    f.write('evil' if 'b' not in '@mode@' else b'evil')
print('REACHED')

## files/change
#: call=chmod|chown|utime|truncate|unlink|rename|link|setxattr|rmdir|replace
#: path=@canary@|@stdlib@/os.py|/lib|/usr|/
import os
path = '@path@'
{'chmod': lambda: os.chmod(path, 0o777), 'chown': lambda: os.chown(path, os.getuid(), os.getgid()),
 'utime': lambda: os.utime(path), 'truncate': lambda: os.truncate(path, 0), 'unlink': lambda: os.unlink(path),
 'rename': lambda: os.rename(path, path + 'x'), 'link': lambda: print(os.link(path, '/tmp/work/l'), open('/tmp/work/l', 'a')),
 'setxattr': lambda: os.setxattr(path, 'user.x', b'x'), 'rmdir': lambda: os.rmdir(path),
 'replace': lambda: (open('mine', 'w').close(), os.replace('mine', path))}['@call@']()
print('REACHED')

## files/device
#: kind=0o060000|0o020000
#: number=0x0800|0xfd00|0xfe00|0x0101|0x010b
import os
os.mknod('device', @kind@ | 0o600, @number@)
print('REACHED', os.read(os.open('device', os.O_RDONLY), 100))

## files/handle
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
class H(ctypes.Structure): _fields_ = [('bytes', ctypes.c_uint), ('type', ctypes.c_int), ('h', ctypes.c_ubyte * 8)]
for inode in range(2, 40):
    h = H(8, 1, (ctypes.c_ubyte * 8)(inode))
    fd = libc.syscall(304, os.open('/', os.O_RDONLY), ctypes.byref(h), 0)
    if fd >= 0: print('REACHED', os.listdir(fd))

## files/mount
#: kind=proc|sysfs|tmpfs|devpts|devtmpfs|cgroup2|overlay|bpf|debugfs|securityfs|mqueue
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True); os.mkdir('m')
if libc.mount(b'none', b'm', b'@kind@', 0, None) == 0: print('REACHED', os.listdir('m'))

## files/remount
#: path=/|/lib|/usr/lib|/tmp
#: flags=32|4128|4096|20480|262144
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b'@path@', b'@path@', None, @flags@, None) == 0: print('REACHED')

## files/unmount
#: path=/lib|/usr/lib|/tmp|/|/dev/null
#: flag=0|1|2|8
import ctypes
if ctypes.CDLL(None).umount2(b'@path@', @flag@) == 0: print('REACHED')

## files/new_mounts
#: call=428,-100,b'/',1|430,b'tmpfs',0|442,-100,b'/',0x8000,b'0'*32,32|155,b'/tmp',b'/tmp'|429,-100,b'/lib',-100,b'/tmp/work',0|433,-100,b'/',0
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(@call@) >= 0: print('REACHED')

## links/symbolic
#: target=@canary@|/etc/passwd|/proc/1/root|/root|../../../..@canary@
import os
os.symlink('@target@', 'link')
own = os.__file__.split('/')
print('REACHED', [n for n in os.listdir('link') if n not in own] or 1 / 0 if os.path.isdir('link') else open('link').read(100))

## links/write_through
#: target=@canary@|/lib/evil|@stdlib@/os.py
import os
os.symlink('@target@', 'link'); open('link', 'a').write('evil'); print('REACHED')

## links/hard
#: target=@canary@|@stdlib@/os.py|/dev/zero
import os
os.link('@target@', 'link'); open('link', 'a').write('evil'); print('REACHED')

## links/replace_standard_input
#: target=@canary@|/etc/passwd
import os
os.unlink('/tmp/.stdin'); os.symlink('@target@', '/tmp/.stdin'); print(open('/tmp/.stdin').read(100)); print('REACHED')

## links/race
#: rounds=200|2000
import os, threading
stop = False
def swap():
    while not stop:
        for target in ('/tmp/work/safe', '@canary@'):
            try: os.symlink(target, 'new'); os.replace('new', 'link')
            except OSError: pass
open('safe', 'w').write('safe'); thread = threading.Thread(target=swap); thread.start()
for _ in range(@rounds@):
    try: print(open('link').read(20)) if open('link').read(20) != 'safe' else None
    except OSError: pass
stop = True; thread.join()

## links/archive
#: kind=tar|zip
import io, os, tarfile, zipfile
if '@kind@' == 'tar':
    with tarfile.open('a.tar', 'w') as t:
        info = tarfile.TarInfo('../../../..@canary@'); info.size = 4; t.addfile(info, io.BytesIO(b'evil'))
    tarfile.open('a.tar').extractall('/')
else:
    with zipfile.ZipFile('a.zip', 'w') as z: z.writestr('../../../..@canary@', 'evil')
    zipfile.ZipFile('a.zip').extractall('/')
print('extracted')

## links/folder_as_root
import os
os.symlink('/', 'root'); os.chdir('root'); os.chdir('..')
print(os.listdir('.')); print('REACHED' if 'etc' in os.listdir('.') else '')
"""
