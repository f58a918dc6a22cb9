//! Waits that an object store asks for (`Retry-After`) are kept, and told of.
//!
//! The crate `object_store` repeats a refused request by itself, a moment later whatever the answer asks for, and says nothing.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};

use crate::storage::http::{LONGEST_WAIT, retry_after};
use crate::storage::waits::{Wait, Waits};

/// Makes clients that do.
#[derive(Debug)]
pub(super) struct Patient(pub(super) Arc<Waits>);

/// One.
#[derive(Debug)]
struct Client {
    inner: HttpClient,
    waits: Arc<Waits>,
}

impl HttpConnector for Patient {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Client { inner, waits: Arc::clone(&self.0) }))
    }
}

impl HttpService for Client {
    fn call<'a, 'b>(
        &'a self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let url = request.uri().to_string();
            let answer = self.inner.execute(request).await?;
            let asked = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()).and_then(retry_after);
            let refused = answer.status().is_server_error() || answer.status().as_u16() == 429;
            if let (Some(time), true) = (asked, refused) {
                let time = time.min(LONGEST_WAIT);
                self.waits.begin(&Wait::at(&url, time));
                tokio::time::sleep(time).await;
            }
            Ok(answer)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    use object_store::aws::AmazonS3Builder;
    use object_store::path::Path;
    use object_store::{ObjectStoreExt, RetryConfig};

    #[test]
    fn a_wait_that_a_store_asks_for_is_kept_and_told() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let place = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            for head in [
                "503 Slow Down\r\nRetry-After: 1",
                "200 OK\r\nETag: \"e\"\r\nLast-Modified: Thu, 01 Jan 1970 00:00:00 GMT",
            ] {
                let (mut stream, _) = listener.accept().unwrap();
                let (mut asked, mut part) = (Vec::new(), [0; 4096]);
                while !asked.windows(4).any(|end| end == b"\r\n\r\n") {
                    let read = stream.read(&mut part).unwrap();
                    asked.extend_from_slice(&part[..read]);
                }
                let answer = format!("HTTP/1.1 {head}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let told = Arc::new(Mutex::new(Vec::new()));
        let hears = Arc::clone(&told);
        let waits = Waits::new(Box::new(move |host, time| hears.lock().unwrap().push((host.to_owned(), time))));
        let store = AmazonS3Builder::new()
            .with_bucket_name("bucket")
            .with_endpoint(format!("http://{place}"))
            .with_access_key_id("key")
            .with_secret_access_key("secret")
            .with_client_options(ClientOptions::new().with_allow_http(true))
            .with_retry(RetryConfig::default())
            .with_http_connector(Patient(Arc::new(waits)))
            .build()
            .unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let begin = Instant::now();
        runtime.block_on(store.head(&Path::from("object"))).unwrap();
        assert!(begin.elapsed() >= Duration::from_secs(1));
        server.join().unwrap();
        assert_eq!(*told.lock().unwrap(), [(place, Duration::from_secs(1))]);
    }
}
