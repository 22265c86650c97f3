<?php
// What programs in PHP do to be somebody, as client.py: AsyncAws signs one request.
require 'AsyncAws/Core/autoload.php';

$sts = new AsyncAws\Core\Sts\StsClient(['endpoint' => getenv('ENDPOINT'), 'region' => getenv('AWS_REGION')]);
echo $sts->getCallerIdentity()->getAccount(), "\n";
