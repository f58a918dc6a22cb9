//! Objects in S3, Google Cloud Storage and Azure, read by byte range through the `object_store` crate.
//!
//! - A prefix looks like a directory of the objects right under it.
//! - The first look tells an object's length and version (ETag); every range demands that version.
//! - A file is uploaded in parts, and appears when the last one is there.
//! - Keys, regions and endpoints are told by the variables that `object_store` reads: `AWS_ACCESS_KEY_ID`, `GOOGLE_...`,
//!   `AZURE_STORAGE_...`.
//!
//! The crate takes as long to build as all the rest, so it is behind the feature `cloud`; without it there is nothing here but
//! the refusal.

use std::path::Path;

/// Beginnings of the addresses of objects.
const SCHEMES: [&str; 8] = ["s3://", "s3a://", "gs://", "az://", "azure://", "adl://", "abfs://", "abfss://"];

/// Whether `path` is in an object store.
pub fn is_object(path: &Path) -> bool {
    let text = path.as_os_str().as_encoded_bytes();
    SCHEMES.iter().any(|scheme| text.starts_with(scheme.as_bytes()))
}

#[cfg(feature = "cloud")]
mod errors;
#[cfg(feature = "cloud")]
mod waiting;

#[cfg(feature = "cloud")]
pub(super) use stores::Clouds;

#[cfg(not(feature = "cloud"))]
pub(super) use absent::Clouds;

#[cfg(not(feature = "cloud"))]
mod absent {
    use std::ffi::OsString;
    use std::path::Path;
    use std::sync::Arc;

    use crate::error::{Error, Result};
    use crate::storage::InputFile;
    use crate::storage::remote::Far;
    use crate::storage::waits::Waits;

    /// No object store.
    #[derive(Default)]
    pub(in crate::storage) struct Clouds {}

    impl Clouds {
        pub(in crate::storage) fn telling(_: Arc<Waits>) -> Self {
            Self {}
        }

        pub(in crate::storage) fn list(&self, path: &Path) -> Result<Vec<OsString>> {
            Err(Error::input("this program was built without object stores")
                .at(path)
                .help("use a released one, or build it with --features cloud"))
        }

        pub(in crate::storage) fn open(&self, path: &Path) -> Result<Option<Arc<dyn Far>>> {
            self.list(path).map(|_| None)
        }

        pub(in crate::storage) fn upload(
            &self,
            _: &dyn InputFile,
            to: &Path,
            _: &dyn Fn() -> Result<()>,
        ) -> Result<()> {
            self.list(to).map(drop)
        }
    }
}

#[cfg(feature = "cloud")]
mod stores {
    use std::collections::{HashMap, VecDeque};
    use std::ffi::OsString;
    use std::future::{Future, poll_fn};
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Mutex, OnceLock};
    use std::time::Duration;

    use object_store::aws::AmazonS3Builder;
    use object_store::azure::MicrosoftAzureBuilder;
    use object_store::gcp::GoogleCloudStorageBuilder;
    use object_store::path::Path as Key;
    use object_store::{
        ClientOptions, GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt, ObjectStoreScheme,
        RetryConfig,
    };
    use tokio::runtime::Runtime;
    use url::Url;

    use super::errors::{changed, explained};
    use super::waiting::Patient;
    use crate::error::{Error, Result, printable};
    use crate::limits::{UPLOAD_PART_BYTES, UPLOAD_PARTS_AT_ONCE, upload_part_bytes};
    use crate::storage::ahead::Source;
    use crate::storage::online::lock;
    use crate::storage::remote::{DEVICE, Far, HEAD_BYTES, hash};
    use crate::storage::waits::Waits;
    use crate::storage::{Identity, InputFile};

    /// Attempts at one request after the first, and how long they may take together: a signature holds for 15 minutes.
    const RETRIES: usize = 5;
    const RETRY_TIME: Duration = Duration::from_secs(500);
    /// A request of the longest range has so long.
    const REQUEST_TIME: Duration = Duration::from_secs(600);

    /// The object stores that were asked.
    #[derive(Default)]
    pub(in crate::storage) struct Clouds {
        runtime: OnceLock<Arc<Runtime>>,
        /// By scheme and bucket.
        stores: Mutex<HashMap<String, Arc<dyn ObjectStore>>>,
        /// Names right under a prefix.
        lists: Mutex<HashMap<PathBuf, Result<Vec<OsString>>>>,
        waits: Arc<Waits>,
    }

    /// One object.
    struct Object {
        runtime: Arc<Runtime>,
        store: Arc<dyn ObjectStore>,
        key: Key,
        path: PathBuf,
        identity: Identity,
        tag: Option<String>,
        head: Vec<u8>,
    }

    impl Clouds {
        /// Stores whose requests to wait are told.
        pub(in crate::storage) fn telling(waits: Arc<Waits>) -> Self {
            Self { waits, ..Self::default() }
        }

        fn runtime(&self) -> Arc<Runtime> {
            Arc::clone(self.runtime.get_or_init(|| {
                // Fails if there is one already, which is as good.
                let _ = rustls::crypto::ring::default_provider().install_default();
                let mut builder = tokio::runtime::Builder::new_multi_thread();
                Arc::new(builder.worker_threads(1).enable_all().build().expect("one thread can be started"))
            }))
        }

        /// The store that `path` is in, and its key there.
        fn find(&self, path: &Path) -> Result<(Arc<dyn ObjectStore>, Key)> {
            let not_one = |why: String| {
                Error::input(format!("not an address in an object store: {}", printable(&why)))
                    .at(path)
                    .help("write s3://bucket/prefix")
            };
            let url = Url::parse(&path.to_string_lossy()).map_err(|e| not_one(e.to_string()))?;
            let (scheme, key) = ObjectStoreScheme::parse(&url).map_err(|e| not_one(e.to_string()))?;
            let place = format!("{}://{}", url.scheme(), url.authority());
            self.runtime();
            let mut stores = lock(&self.stores);
            let store = match stores.get(&place) {
                Some(store) => Arc::clone(store),
                None => {
                    let store = build(&scheme, &url, Patient(Arc::clone(&self.waits))).map_err(|e| {
                        Error::input(format!("its store is not known: {}", printable(&e.to_string()))).at(path).help(
                            "set the store's variables in the environment (AWS_..., GOOGLE_..., AZURE_STORAGE_...)",
                        )
                    })?;
                    stores.insert(place, Arc::clone(&store));
                    store
                }
            };
            Ok((store, key))
        }

        /// Names of the objects right under a prefix; none if there are none.
        pub(in crate::storage) fn list(&self, path: &Path) -> Result<Vec<OsString>> {
            if let Some(known) = lock(&self.lists).get(path) {
                return known.clone();
            }
            let found = self.list_anew(path);
            lock(&self.lists).insert(path.to_path_buf(), found.clone());
            found
        }

        fn list_anew(&self, path: &Path) -> Result<Vec<OsString>> {
            let (store, key) = self.find(path)?;
            let found = self.runtime().block_on(store.list_with_delimiter(Some(&key)));
            let found = found.map_err(|e| explained(&e, path))?;
            let names = found.objects.iter().filter_map(|object| object.location.filename().map(OsString::from));
            let mut names: Vec<OsString> = names.collect();
            names.sort_unstable();
            Ok(names)
        }

        /// The object at `path`, if there is one.
        pub(in crate::storage) fn open(&self, path: &Path) -> Result<Option<Arc<dyn Far>>> {
            let (store, key) = self.find(path)?;
            let runtime = self.runtime();
            let meta = match runtime.block_on(store.head(&key)) {
                Ok(meta) => meta,
                Err(object_store::Error::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(explained(&error, path)),
            };
            let mut object = Object {
                identity: identity(path, meta.size, meta.e_tag.as_deref()),
                path: path.to_path_buf(),
                tag: meta.e_tag,
                head: Vec::new(),
                runtime,
                store,
                key,
            };
            let mut head = vec![0; meta.size.min(HEAD_BYTES) as usize];
            if !head.is_empty() {
                object.fetch(&mut head, 0)?;
            }
            object.head = head;
            Ok(Some(Arc::new(object)))
        }
    }

    impl Clouds {
        /// Copies `file` to `to`.
        pub(in crate::storage) fn upload(
            &self,
            file: &dyn InputFile,
            to: &Path,
            go_on: &dyn Fn() -> Result<()>,
        ) -> Result<()> {
            let (store, key) = self.find(to)?;
            let (runtime, bytes) = (self.runtime(), file.identity().bytes);
            go_on()?;
            if bytes <= UPLOAD_PART_BYTES {
                let whole = part_of(file, 0, bytes)?;
                runtime.block_on(store.put(&key, whole.into())).map_err(|e| explained(&e, to))?;
            } else {
                let mut upload = runtime.block_on(store.put_multipart(&key)).map_err(|e| explained(&e, to))?;
                let sent = send(&runtime, &mut *upload, file, to, go_on);
                let complete = sent.and_then(|()| runtime.block_on(upload.complete()).map_err(|e| explained(&e, to)));
                if let Err(error) = complete {
                    // Best effort: parts that nobody completes may be kept, and paid for.
                    let _ = runtime.block_on(upload.abort());
                    return Err(error);
                }
            }
            let there = runtime.block_on(store.head(&key)).map_err(|e| explained(&e, to))?.size;
            if there != bytes {
                let what = format!("{bytes} bytes were uploaded, and {there} are there");
                return Err(Error::failed(what).at(to).help("run the same command again"));
            }
            Ok(())
        }
    }

    fn part_of(file: &dyn InputFile, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        let mut part = vec![0; bytes as usize];
        file.read_at(&mut part, offset)?;
        Ok(part)
    }

    /// Sends all parts of `file`.
    fn send(
        runtime: &Runtime,
        upload: &mut dyn MultipartUpload,
        file: &dyn InputFile,
        to: &Path,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let bytes = file.identity().bytes;
        let length = upload_part_bytes(bytes);
        let mut sending = VecDeque::new();
        let mut result = Ok(());
        let mut offset = 0;
        while result.is_ok() && (offset < bytes || !sending.is_empty()) {
            if offset < bytes && sending.len() < UPLOAD_PARTS_AT_ONCE {
                let part = go_on().and_then(|()| part_of(file, offset, length.min(bytes - offset)));
                result = part.map(|part| sending.push_back(runtime.spawn(upload.put_part(part.into()))));
                offset += length;
                continue;
            }
            let Some(part) = sending.pop_front() else { break };
            result = match runtime.block_on(part) {
                Ok(sent) => sent.map_err(|e| explained(&e, to)),
                Err(lost) => Err(Error::failed(format!("the upload got lost: {lost}")).at(to)),
            };
        }
        sending.into_iter().for_each(|part| drop(runtime.block_on(part)));
        result
    }

    fn identity(path: &Path, bytes: u64, tag: Option<&str>) -> Identity {
        let path = path.to_string_lossy();
        Identity {
            bytes,
            mtime_ns: i128::from(hash(&[tag.unwrap_or_default(), &path]) >> 1),
            ctime_ns: 0,
            device: DEVICE,
            inode: hash(&[&path]),
        }
    }

    fn build(scheme: &ObjectStoreScheme, url: &Url, client: Patient) -> object_store::Result<Arc<dyn ObjectStore>> {
        let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY_TIME, ..RetryConfig::default() };
        let options = ClientOptions::new().with_timeout(REQUEST_TIME).with_connect_timeout(Duration::from_secs(10));
        // Unencrypted only where the user's own endpoint is.
        let plain = |names: &[&str]| {
            let endpoint = names.iter().find_map(|name| std::env::var(name).ok());
            endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"))
        };
        Ok(match scheme {
            ObjectStoreScheme::GoogleCloudStorage => Arc::new(
                GoogleCloudStorageBuilder::from_env()
                    .with_client_options(options.with_allow_http(plain(&["GOOGLE_BASE_URL"])))
                    .with_url(url.as_str())
                    .with_retry(retry)
                    .with_http_connector(client)
                    .build()?,
            ),
            ObjectStoreScheme::MicrosoftAzure => Arc::new(
                MicrosoftAzureBuilder::from_env()
                    .with_client_options(options.with_allow_http(plain(&["AZURE_STORAGE_ENDPOINT"])))
                    .with_url(url.as_str())
                    .with_retry(retry)
                    .with_http_connector(client)
                    .build()?,
            ),
            _ => Arc::new(
                AmazonS3Builder::from_env()
                    .with_client_options(options.with_allow_http(plain(&["AWS_ENDPOINT_URL", "AWS_ENDPOINT"])))
                    .with_url(url.as_str())
                    .with_retry(retry)
                    .with_http_connector(client)
                    .build()?,
            ),
        })
    }

    impl Object {
        /// Fills `buffer` from `offset`, in one request and what the client repeats of it.
        async fn get(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
            let options = GetOptions {
                range: Some(GetRange::Bounded(offset..offset + buffer.len() as u64)),
                if_match: self.tag.clone(),
                ..GetOptions::default()
            };
            let found = self.store.get_opts(&self.key, options).await.map_err(|e| explained(&e, &self.path))?;
            if found.range != (offset..offset + buffer.len() as u64) || found.meta.size != self.identity.bytes {
                return Err(changed(&self.path));
            }
            let (mut stream, mut done) = (found.into_stream(), 0);
            while let Some(part) = poll_fn(|context| stream.as_mut().poll_next(context)).await {
                let part = part.map_err(|e| explained(&e, &self.path))?;
                let Some(place) = buffer.get_mut(done..done + part.len()) else {
                    return Err(Error::failed("the server sent more than was asked for").at(&self.path));
                };
                place.copy_from_slice(&part);
                done += part.len();
            }
            match done == buffer.len() {
                true => Ok(()),
                false => Err(Error::failed("the answer ended early").at(&self.path).help("run the same command again")),
            }
        }

        fn wait<T>(&self, work: impl Future<Output = T>) -> T {
            self.runtime.block_on(work)
        }
    }

    impl Source for Object {
        fn fetch(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
            self.wait(self.get(buffer, offset))
        }
    }

    impl Far for Object {
        fn path(&self) -> &Path {
            &self.path
        }

        fn identity(&self) -> &Identity {
            &self.identity
        }

        fn identity_now(&self) -> Result<Identity> {
            match self.wait(self.store.head(&self.key)) {
                Ok(now) => Ok(identity(&self.path, now.size, now.e_tag.as_deref())),
                Err(object_store::Error::NotFound { .. }) => Err(changed(&self.path)),
                Err(error) => Err(explained(&error, &self.path)),
            }
        }

        fn head(&self) -> &[u8] {
            &self.head
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::storage::{Disk, IoMode, Storage};
        use object_store::memory::InMemory;
        use std::cell::Cell;

        #[test]
        fn what_is_uploaded_is_what_is_read() {
            let (clouds, dir) = (Clouds::default(), tempfile::tempdir().unwrap());
            lock(&clouds.stores).insert("s3://bucket".into(), Arc::new(InMemory::new()));
            let disk = Disk::new(IoMode::Read);
            for bytes in
                [0, 1, UPLOAD_PART_BYTES - 1, UPLOAD_PART_BYTES, UPLOAD_PART_BYTES + 1, 3 * UPLOAD_PART_BYTES + 77]
            {
                let content: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8 ^ (at >> 20) as u8).collect();
                let (from, to) = (dir.path().join("file"), format!("s3://bucket/a/{bytes}"));
                std::fs::write(&from, &content).unwrap();
                clouds.upload(&*disk.open(&from).unwrap(), Path::new(&to), &|| Ok(())).unwrap();
                let there = clouds.open(Path::new(&to)).unwrap().unwrap();
                assert_eq!(there.identity().bytes, bytes);
                let mut read = vec![0; content.len()];
                if bytes > 0 {
                    there.fetch(&mut read, 0).unwrap();
                }
                assert!(read == content, "{bytes} bytes");
            }
            assert_eq!(clouds.list(Path::new("s3://bucket/a")).unwrap().len(), 6);
        }

        #[test]
        fn an_upload_that_is_stopped_leaves_nothing() {
            let (clouds, dir) = (Clouds::default(), tempfile::tempdir().unwrap());
            lock(&clouds.stores).insert("s3://bucket".into(), Arc::new(InMemory::new()));
            let from = dir.path().join("file");
            std::fs::write(&from, vec![7; 3 * UPLOAD_PART_BYTES as usize]).unwrap();
            let asked = Cell::new(0);
            let go_on = || {
                asked.set(asked.get() + 1);
                if asked.get() > 2 { Err(Error::interrupted("interrupted")) } else { Ok(()) }
            };
            let file = Disk::new(IoMode::Read).open(&from).unwrap();
            clouds.upload(&*file, Path::new("s3://bucket/a/b"), &go_on).unwrap_err();
            assert!(clouds.open(Path::new("s3://bucket/a/b")).unwrap().is_none());
        }
    }
}
