//! Where the disks of a restore lie until all of them are whole: a hidden folder,
//! `.TARGET.UUID.partial`.
//!
//! It lies beside the target and becomes the target at once, by one rename, if there is no target
//! yet, or an empty folder that nobody misses: it keeps owner, mode and attributes, and is neither a
//! mount point nor the folder that this process stands in. Any other target stays the folder that it
//! is. The hidden folder then lies in it, and the files get their names one after the other, as
//! further links.
//!
//! What always holds: nothing that exists is overwritten; a target that is made or replaced has all
//! disks or none, also after a kill. In a target that stays, a kill between two names leaves some of
//! them, and the hidden folder with all; by that the next restore into it sees what happened, and
//! says so ([`RestoreError::HalfNamed`]). The folder is locked while its restore runs: what is found
//! without a lock is of one that was killed, and is removed.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags, StatxAttributes, StatxFlags, flock,
    getxattr, ioctl_getflags, linkat, listxattr, open, renameat_with, statx,
};
use rustix::io::Errno;

use super::RestoreError;

const NOREPLACE: RenameFlags = RenameFlags::NOREPLACE;
const SUFFIX: &str = ".partial";
/// As much of the target's name as the hidden folder's can hold.
const STEM_BYTES_MAX: usize = 200;
/// Longest list of extended attributes, and longest value of one.
const ATTRIBUTES_BYTES_MAX: usize = 64 * 1024;
/// A new folder may be taken for a leftover before it is locked; not so often in a row.
const CREATE_TRIES: usize = 8;

/// The hidden folder of one restore; removed when dropped, with all that is in it.
#[derive(Debug)]
pub(super) struct Staging {
    /// As asked for, for messages.
    target: PathBuf,
    /// Where that really is.
    place: PathBuf,
    folder: PathBuf,
    becomes: Becomes,
    /// Holds the lock.
    _lock: File,
}

/// What becomes of the hidden folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Becomes {
    /// The target, which does not exist.
    New,
    /// The target, which is empty.
    Replacement,
    /// Nothing: its files are named in the target.
    Nothing,
}

impl Staging {
    /// Makes the hidden folder for files of these names in `target`; removes what killed restores
    /// into it have left.
    pub(super) fn create(target: &Path, names: &[String]) -> Result<Self, RestoreError> {
        let exists = match fs::metadata(target) {
            Ok(found) if found.is_dir() => true,
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && target.file_name().is_some() =>
            {
                false
            }
            // Says what is wrong with it.
            _ => make_folder(target).map(|()| true)?,
        };
        if exists {
            Self::for_existing(target, names)
        } else {
            Self::for_new(target)
        }
    }

    fn for_new(target: &Path) -> Result<Self, RestoreError> {
        if target.symlink_metadata().is_ok() {
            // A link to nowhere.
            return Err(RestoreError::write(target)(Errno::EXIST.into()));
        }
        let parent = parent_of(target);
        make_folder(parent)?;
        let parent = parent.canonicalize().map_err(RestoreError::write(parent))?;
        let place = parent.join(target.file_name().unwrap_or_default());
        // Better now than when all is written.
        sync_folder(&parent).map_err(RestoreError::write(&parent))?;
        sweep(&parent, &place, target)?;
        let (folder, lock) = make_hidden(&parent, &place).map_err(RestoreError::write(target))?;
        Ok(Self {
            target: target.to_owned(),
            place,
            folder,
            becomes: Becomes::New,
            _lock: lock,
        })
    }

    fn for_existing(target: &Path, names: &[String]) -> Result<Self, RestoreError> {
        let place = target.canonicalize().map_err(RestoreError::write(target))?;
        if let Some(parent) = place.parent() {
            sweep(parent, &place, target)?;
        }
        sweep(&place, &place, target)?;
        for path in names.iter().map(|name| target.join(name)) {
            if path.symlink_metadata().is_ok() {
                return Err(RestoreError::Exists(path));
            }
        }
        let made = |folder, becomes, lock| Self {
            target: target.to_owned(),
            place: place.clone(),
            folder,
            becomes,
            _lock: lock,
        };
        if may_be_replaced(&place)
            && let Some(parent) = place.parent()
            && sync_folder(parent).is_ok()
            && let Ok((folder, lock)) = make_hidden(parent, &place)
        {
            let beside = made(folder, Becomes::Replacement, lock);
            if beside.made_like_target().unwrap_or(false) {
                return Ok(beside);
            }
        }
        let (folder, lock) = make_hidden(&place, &place).map_err(RestoreError::write(target))?;
        Ok(made(folder, Becomes::Nothing, lock))
    }

    /// Where a file of this name is written.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Gives the hidden folder the mode of the target. Whether nobody sees the difference then.
    fn made_like_target(&self) -> io::Result<bool> {
        let target = fs::metadata(&self.place)?;
        fs::set_permissions(&self.folder, target.permissions())?;
        let folder = fs::metadata(&self.folder)?;
        let seen = |of: &fs::Metadata| (of.dev(), of.uid(), of.gid(), of.mode());
        let flags = |path: &Path| io::Result::Ok(ioctl_getflags(File::open(path)?.as_fd()).ok());
        Ok(seen(&folder) == seen(&target)
            && flags(&self.folder)? == flags(&self.place)?
            && attributes(&self.folder)? == attributes(&self.place)?)
    }

    /// Gives the files of these names, whole and durable, their places in the target: all, or none.
    pub(super) fn publish(mut self, names: &[String]) -> Result<(), RestoreError> {
        sync_folder(&self.folder).map_err(RestoreError::write(&self.target))?;
        let renamed = match self.becomes {
            Becomes::New => match renameat_with(CWD, &self.folder, CWD, &self.place, NOREPLACE) {
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    fs::rename(&self.folder, &self.place)
                }
                renamed => renamed.map_err(io::Error::from),
            },
            // Over an empty folder only, or it fails.
            Becomes::Replacement => fs::rename(&self.folder, &self.place),
            Becomes::Nothing => return self.name_each(names),
        };
        match renamed {
            Ok(()) => {
                let folder = std::mem::take(&mut self.folder);
                let parent = folder.parent().unwrap_or(Path::new("/"));
                sync_folder(parent).map_err(RestoreError::write(&self.target))
            }
            // It is not empty any more, or was made meanwhile, or is a mount point since.
            Err(_) if self.place.is_dir() => self.name_each(names),
            Err(source) => Err(RestoreError::write(&self.target)(source)),
        }
    }

    fn name_each(&self, names: &[String]) -> Result<(), RestoreError> {
        for (done, name) in names.iter().enumerate() {
            if let Err(error) = link(&self.folder.join(name), &self.place.join(name)) {
                for named in &names[..done] {
                    // A moment ago this was ours; if it cannot be removed, the error says what failed.
                    let _ = fs::remove_file(self.place.join(named));
                }
                let path = self.target.join(name);
                return Err(match error.kind() {
                    io::ErrorKind::AlreadyExists => RestoreError::Exists(path),
                    _ => RestoreError::write(&path)(error),
                });
            }
        }
        sync_folder(&self.place).map_err(RestoreError::write(&self.target))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.folder != Path::new("") {
            // Nothing can be done about what cannot be removed; its name says what it is.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Makes a folder, and those above it, durably, for their owner alone: whoever may read a disk may
/// read everything on it.
fn make_folder(folder: &Path) -> Result<(), RestoreError> {
    let missing = |path: &&Path| *path != Path::new("") && !path.exists();
    let above: Vec<&Path> = folder.ancestors().take_while(missing).collect();
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(folder);
    made.map_err(RestoreError::write(folder))?;
    for made in above {
        sync_folder(parent_of(made)).map_err(RestoreError::write(folder))?;
    }
    Ok(())
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Makes the names in a folder durable.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Makes a hidden folder for the target at `place`, locked.
fn make_hidden(parent: &Path, place: &Path) -> io::Result<(PathBuf, File)> {
    for _ in 0..CREATE_TRIES {
        let mut name = stem(place);
        name.push(format!("{}{SUFFIX}", uuid::Uuid::new_v4()));
        let folder = parent.join(name);
        fs::DirBuilder::new().mode(0o700).create(&folder)?;
        let opened = open_folder(&folder);
        let lock = opened.inspect_err(|_| _ = fs::remove_dir(&folder))?;
        // Where nothing can be locked nobody takes it for a leftover either.
        if flock(&lock, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
            continue;
        }
        if same_file(&lock.metadata()?, folder.symlink_metadata().ok().as_ref()) {
            return Ok((folder, lock));
        }
    }
    Err(Errno::BUSY.into())
}

/// What the names of the hidden folders for a target begin with.
fn stem(place: &Path) -> OsString {
    let name = place.file_name().unwrap_or(OsStr::new("restore"));
    let name = &name.as_bytes()[..name.len().min(STEM_BYTES_MAX)];
    OsString::from_vec([b".", name, b"."].concat())
}

fn open_folder(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(open(path, flags, Mode::empty())?.into())
}

fn same_file(file: &fs::Metadata, other: Option<&fs::Metadata>) -> bool {
    other.is_some_and(|other| (file.dev(), file.ino()) == (other.dev(), other.ino()))
}

/// Removes the hidden folders in `parent` of killed restores into the target at `place`.
fn sweep(parent: &Path, place: &Path, target: &Path) -> Result<(), RestoreError> {
    let stem = stem(place);
    // Where there is nothing to see there is nothing to remove.
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let unique = name.as_bytes().strip_prefix(stem.as_bytes());
        let unique = unique.and_then(|rest| rest.strip_suffix(SUFFIX.as_bytes()));
        if unique.is_none_or(|unique| uuid::Uuid::try_parse_ascii(unique).is_err()) {
            continue;
        }
        let leftover = entry.path();
        let Ok(lock) = open_folder(&leftover) else {
            continue;
        };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let (named, unnamed) = named_already(&leftover, place);
        if !named.is_empty() && unnamed > 0 {
            let named = named.into_iter().map(|name| target.join(name)).collect();
            return Err(RestoreError::HalfNamed(named));
        }
        let _ = fs::remove_dir_all(&leftover);
    }
    Ok(())
}

/// The files of a leftover that have names in the target, and how many have not.
fn named_already(leftover: &Path, place: &Path) -> (Vec<OsString>, usize) {
    let (mut named, mut unnamed) = (Vec::new(), 0);
    for entry in fs::read_dir(leftover).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let there = place.join(&name).symlink_metadata().ok();
        match entry.metadata() {
            Ok(file) if same_file(&file, there.as_ref()) => named.push(name),
            _ => unnamed += 1,
        }
    }
    named.sort_unstable();
    (named, unnamed)
}

/// Whether a folder is empty and may be exchanged for another as far as its place goes.
fn may_be_replaced(place: &Path) -> bool {
    let empty = fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_none());
    empty && !is_mount_point(place) && !is_where_we_stand(place)
}

/// Whether something is mounted there, or the kernel cannot tell.
fn is_mount_point(place: &Path) -> bool {
    let root = StatxAttributes::MOUNT_ROOT;
    statx(CWD, place, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty()).map_or(true, |found| {
        !found.stx_attributes_mask.contains(root) || found.stx_attributes.contains(root)
    })
}

/// A shell that was left in the old folder would see nothing.
fn is_where_we_stand(place: &Path) -> bool {
    let here = fs::metadata(".").ok();
    fs::metadata(place).is_ok_and(|place| same_file(&place, here.as_ref()))
}

/// Extended attributes, access control lists among them.
fn attributes(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut buffer = vec![0; ATTRIBUTES_BYTES_MAX];
    let len = match listxattr(path, &mut buffer[..]) {
        Err(Errno::OPNOTSUPP) => 0,
        len => len?,
    };
    let names = buffer[..len].to_vec();
    let names = names.split(|byte| *byte == 0).filter(|n| !n.is_empty());
    names
        .map(|name| {
            let len = getxattr(path, name, &mut buffer[..])?;
            Ok((name.to_vec(), buffer[..len].to_vec()))
        })
        .collect()
}

/// Gives a file a further name, unless something else has it; where a file system has no links, a
/// name instead of the one it has.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    match linkat(CWD, from, CWD, to, AtFlags::empty()) {
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK) => {
            Ok(renameat_with(CWD, from, CWD, to, NOREPLACE)?)
        }
        linked => Ok(linked?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_and_the_folder_of_the_process_are_not_replaced() {
        assert!(is_mount_point(Path::new("/proc")));
        assert!(is_mount_point(Path::new("/")));
        assert!(is_where_we_stand(Path::new(".")));
        let folder = tempfile::tempdir().expect("a folder");
        assert!(may_be_replaced(folder.path()));
        fs::write(folder.path().join("file"), "theirs").expect("written");
        assert!(!may_be_replaced(folder.path()));
    }

    #[test]
    fn hidden_folders_of_long_names_can_be_made() {
        let folder = tempfile::tempdir().expect("a folder");
        let long = folder.path().join("n".repeat(255));
        for target in [&long, folder.path()] {
            let (made, _lock) = make_hidden(folder.path(), target).expect("made");
            let parent = made.parent().expect("a parent");
            assert_eq!(parent, folder.path());
        }
    }
}
