//! Cgroups without number, made where a container may make them, and events of its own one.

use std::{ffi::CString, fs, io, os::unix::ffi::OsStrExt as _, path::Path, thread, time::Duration};

use tokio::time::Instant;

use super::Course;

/// In one folder, as a folder of many is slow by itself.
const IN_ONE: u32 = 500;
/// No longer than this, whatever there is by then.
const MOST: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(20);
/// Events between two looks at the time.
const BATCH: u64 = 100;

/// Makes `count` of them below `below`, and removes them at the end.
pub(super) fn run(course: &Course, below: &Path, count: u32) -> io::Result<()> {
    let started = Instant::now();
    let mut folders = Vec::new();
    let mut made = 0;
    while made < count && started.elapsed() < MOST && course.goes_on() {
        let folder = below.join(format!("storm-{}", folders.len()));
        fs::create_dir(&folder)?;
        folders.push(folder.clone());
        for number in 0..IN_ONE.min(count - made) {
            fs::create_dir(folder.join(number.to_string()))?;
            made += 1;
        }
    }
    course.count("cgroups", made.into());
    course.in_full_swing();
    while course.goes_on() {
        thread::sleep(PAUSE);
    }
    for folder in folders {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                fs::remove_dir(entry.path())?;
            }
        }
        fs::remove_dir(folder)?;
    }
    Ok(())
}

/// Truncates the `cgroup.events` in `cgroup`, which changes nothing, and which whoever watches the file is told.
pub(super) fn stir(course: &Course, cgroup: &Path) -> io::Result<()> {
    let events = CString::new(cgroup.join("cgroup.events").as_os_str().as_bytes())?;
    course.in_full_swing();
    while course.goes_on() {
        for _ in 0..BATCH {
            // SAFETY: the path ends with 0.
            if unsafe { libc::truncate(events.as_ptr(), 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        course.count("events", BATCH);
    }
    Ok(())
}
