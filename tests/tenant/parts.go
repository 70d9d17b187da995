package tenant

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/minio/minio-go/v7"
)

func (s *s3Store) core() minio.Core { return minio.Core{Client: s.client} }

// BeginUpload implements PartStore.
func (s *s3Store) BeginUpload(ctx context.Context, bucket, key string) (string, error) {
	id, err := s.core().NewMultipartUpload(ctx, bucket, key, minio.PutObjectOptions{ContentType: "application/octet-stream"})
	if err != nil {
		return "", storeError("beginning an upload of "+bucket+"/"+key, err)
	}
	return id, nil
}

// PresignPart implements PartStore.
func (s *s3Store) PresignPart(ctx context.Context, bucket, key, uploadID string, part int, valid time.Duration) (string, error) {
	u, err := s.client.Presign(ctx, http.MethodPut, bucket, key, valid, url.Values{"partNumber": {strconv.Itoa(part)}, "uploadId": {uploadID}})
	if err != nil {
		return "", storeError("signing a part", err)
	}
	return u.String(), nil
}

// CompleteUpload implements PartStore.
func (s *s3Store) CompleteUpload(ctx context.Context, bucket, key, uploadID string, etags []string) (int64, error) {
	parts := make([]minio.CompletePart, len(etags))
	for i, tag := range etags {
		parts[i] = minio.CompletePart{PartNumber: i + 1, ETag: tag}
	}
	doing := "completing the upload of " + bucket + "/" + key
	if _, err := s.core().CompleteMultipartUpload(ctx, bucket, key, uploadID, parts, minio.PutObjectOptions{}); err != nil && !gone(err) {
		return 0, storeError(doing, err)
	}
	info, err := s.client.StatObject(ctx, bucket, key, minio.StatObjectOptions{})
	if err != nil {
		return 0, storeError(doing, err)
	}
	return info.Size, nil
}

// AbortUpload implements PartStore.
func (s *s3Store) AbortUpload(ctx context.Context, bucket, key, uploadID string) error {
	if err := s.core().AbortMultipartUpload(ctx, bucket, key, uploadID); err != nil && !gone(err) {
		return storeError("forgetting the upload of "+bucket+"/"+key, err)
	}
	return nil
}

func gone(err error) bool { return minio.ToErrorResponse(err).Code == minio.NoSuchUpload }
